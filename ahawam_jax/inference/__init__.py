"""The policy and its compiled functions. Imports sampling, checkpoints, towers and below, never training."""
