"""The DeepSpeed config: a JSON that says how a recipe is spread over machines. Imports neither torch nor DeepSpeed."""

from __future__ import annotations

from megagpt.ds_config.layout import Layout, Resolved
from megagpt.ds_config.resolving import load

__all__ = ["Layout", "Resolved", "load"]
