"""Configuration: the recipe says what is trained, the DeepSpeed config how it is distributed."""
