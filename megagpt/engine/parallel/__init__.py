"""Tensor, sequence and pipeline parallelism, based on DeepSpeed's process groups."""
