"""Training state by parameter name: read from, and written into, the partitions of a DeepSpeed engine."""
