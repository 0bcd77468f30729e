"""Inference as the released code does it, restated, only for comparison. Imports nothing else of export."""
