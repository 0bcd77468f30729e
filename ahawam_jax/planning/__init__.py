"""What a training run will need of a cluster: memory, arithmetic, traffic and time, from shapes alone."""
