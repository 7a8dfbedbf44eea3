"""The DeepSpeed config: one JSON file that defines how training is distributed. Imports neither torch nor DeepSpeed."""

from __future__ import annotations

from megagpt.config.deepspeed.layout import Layout, Resolved
from megagpt.config.deepspeed.resolve import load

__all__ = ["Layout", "Resolved", "load"]
