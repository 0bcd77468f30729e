"""The PyTorch twin of the inference modules. Imports nothing else of export."""
