"""Objective, step, loop, optimizer, sharding and the data of a run. Imports sampling, checkpoints, towers and below;
what lies below does not know it."""
