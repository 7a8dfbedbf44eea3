"""The training engines: the only room that knows DeepSpeed."""
