"""Generation in the training process."""
