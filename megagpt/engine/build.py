"""Build the engine that a layout requires."""

from __future__ import annotations

import torch

from megagpt.cluster import Collectives, Rank
from megagpt.config.deepspeed import Resolved
from megagpt.engine.base import Engine
from megagpt.engine.pipeline import PipelineEngine
from megagpt.engine.zero import ZeroEngine


def build(resolved: Resolved, total_updates: int, rank: Rank, collectives: Collectives) -> Engine:
    """Build the model with its initial weights, and return an engine for it. Also seeds torch's RNG for dropout.

    Args:
        resolved: The DeepSpeed config with the recipe and the layout.
        total_updates: Number of updates of the whole run, for the learning rate schedule.
        rank: This rank.
        collectives: The collectives of the job.
    """
    # By default torch seeds every process differently. Tensor-parallel ranks need equal random numbers to stay equal.
    torch.manual_seed(resolved.recipe.seed + rank.rank // resolved.layout.tensor_parallel)
    if resolved.layout.pipeline_stages > 1:
        return PipelineEngine(resolved, total_updates, rank, collectives)
    return ZeroEngine(resolved, total_updates, rank, collectives)
