"""The engine that a layout asks for."""

from __future__ import annotations

import torch

from megagpt.cluster import Collectives, Rank
from megagpt.config.deepspeed import Resolved
from megagpt.engine.base import Engine
from megagpt.engine.pipeline import PipelineEngine
from megagpt.engine.zero import ZeroEngine


def build(resolved: Resolved, total_updates: int, rank: Rank, collectives: Collectives) -> Engine:
    """Build the model with the recipe's initial weights, and the engine around it; seed what is left to chance."""
    # for dropout, where torch by itself begins differently each time; what tensor parts hold alike stays alike
    torch.manual_seed(resolved.recipe.seed + rank.rank // resolved.layout.tensor_parallel)
    if resolved.layout.pipeline_stages > 1:
        return PipelineEngine(resolved, total_updates, rank, collectives)
    return ZeroEngine(resolved, total_updates, rank, collectives)
