"""The planner context under the lens: one function for each quantity, and one in `figures` that draws it.

Everything is computed for one episode at a time and, where it grows with the layers, for one layer at a time. Imports
inference; nothing imports it but notebooks.
"""
