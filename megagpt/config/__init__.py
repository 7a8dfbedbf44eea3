"""Configuration. The recipe defines what is trained, and the DeepSpeed config defines how training is distributed."""
