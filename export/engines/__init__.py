"""ONNX graphs, and engines that run them. Imports twin, exported and manifest."""
