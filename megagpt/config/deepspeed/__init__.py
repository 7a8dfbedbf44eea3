"""The DeepSpeed config, a JSON file that defines how training is distributed.

This package imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

from megagpt.config.deepspeed.layout import Layout, Resolved
from megagpt.config.deepspeed.resolve import load

__all__ = ["Layout", "Resolved", "load"]
