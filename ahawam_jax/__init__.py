"""AHA-WAM in JAX: model, training, inference. Imports configs and data_pipelines, never export or torch; files import
only what lies on the same floor or below."""
