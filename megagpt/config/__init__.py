"""Configuration: the recipe defines what is trained, the DeepSpeed config how it is distributed."""
