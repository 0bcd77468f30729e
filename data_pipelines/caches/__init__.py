"""Decoded canvases and latents on disk. Imports episodes and canvas; windows and the loader import it."""
