"""From a checkpoint to a robot: PyTorch twin, ONNX, engines, deployment core. May import ahawam_jax and
data_pipelines; nothing imports export."""
