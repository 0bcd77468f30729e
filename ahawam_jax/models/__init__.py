"""The trainable model: planner, memory, router, executor. Imports nothing else of ours; all floors may import it."""
