"""Checkpoints: save and publish them, resume from them, list them, and load them for inference."""
