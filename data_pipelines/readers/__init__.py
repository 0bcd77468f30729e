"""Readers of every format behind `Episodes`; `opening` knows them all. Imports episodes and the layout of tfds."""
