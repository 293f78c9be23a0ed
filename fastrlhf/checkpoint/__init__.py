"""What survives a killed run: the run folder and its checkpoints."""
