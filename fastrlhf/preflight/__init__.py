"""What is known at the start is said at the start: one check of a run, by the run itself and by --dry-run."""
