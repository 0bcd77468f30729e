"""From robot recordings to batches. Imports no model code and no JAX; ahawam_jax and export may import all of it."""
