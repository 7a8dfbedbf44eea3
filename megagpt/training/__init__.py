"""A training run: the loop, and what surrounds it. Start reading at `loop` in loop.py."""
