"""Parts of a run: checkpoints, metrics, anomalies, status, console, watchdog, stop signals."""
