"""The DeepSpeed config: one JSON file that defines how training is distributed. Imports neither torch nor DeepSpeed."""

from __future__ import annotations

from megagpt.ds_config.layout import Layout, Resolved
from megagpt.ds_config.resolving import load

__all__ = ["Layout", "Resolved", "load"]
