"""The training loop, with setup, metrics, recovery, status and watchdog. Start reading at `loop` in loop.py."""
