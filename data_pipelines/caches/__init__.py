"""Decoded canvases and latents on disk, and what they go by. Imports episodes and canvas; windows, the loader and tfds
import it."""
