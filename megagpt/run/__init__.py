"""What belongs to a run: checkpoints, metrics, the console, stopping."""
