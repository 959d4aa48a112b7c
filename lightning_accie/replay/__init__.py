"""What is computed again: the training step as a pure function, and the walk along the run."""
