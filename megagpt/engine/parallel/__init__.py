"""Tensor, sequence and pipeline parallelism on DeepSpeed's process groups."""
