"""Read and write the training state of a DeepSpeed engine by parameter name."""
