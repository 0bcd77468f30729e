"""Ways to run a chunk and a refresh, to be timed beside each other. Imports twin, released and exported; only the
benchmark command imports it."""
