"""How far a deployment is from JAX: samples, references, subjects, blocks. Imports twin, engines and exported."""
