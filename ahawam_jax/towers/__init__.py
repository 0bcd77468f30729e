"""The frozen towers: VAE, text encoder, their stand-ins, their weights by name, caches of what they make. Imports
models, weights and data_pipelines; knows no training."""
