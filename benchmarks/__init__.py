"""Measurements, each a command: python -m benchmarks.NAME. Imports everything; nothing imports benchmarks."""
