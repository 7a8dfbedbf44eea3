"""Checkpoints: their format, how they are published, resumed from, listed and loaded for inference."""
