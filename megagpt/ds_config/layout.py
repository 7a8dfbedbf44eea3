"""How a recipe is spread over machines, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megagpt.recipe import Recipe


@dataclass(frozen=True)
class Layout:
    """World size, and the factors into which it and the global batch are cut."""

    world_size: int
    data_parallel: int
    micro_batch: int
    """samples that one rank passes through the model at once"""
    accumulation: int
    """micro-batches per update and rank"""
    zero_stage: int
    pipeline_stages: int = 1
    tensor_parallel: int = 1
    sequence_parallel: int = 1
    recomputed_blocks: int = 0
    """transformer blocks, spread evenly, whose activations are computed again in the backward pass"""
    activations_on_host: bool = False
    """whether what a recomputed block starts from waits in host memory"""

    def data_rank(self, rank: int) -> int:
        """Which share of the data a rank is given: the ranks of one copy of the model are given the same.

        Ranks count tensor and sequence parts first, then data-parallel copies, then pipeline stages.
        """
        return rank // (self.tensor_parallel * self.sequence_parallel) % self.data_parallel


@dataclass(frozen=True)
class Resolved:
    """A DeepSpeed config with no "auto" left, and what follows from it."""

    config: dict[str, Any]
    """what deepspeed.initialize gets, beside our own optimizer and schedule"""
    layout: Layout
    recipe: Recipe
    """with its precision filled in"""
    notes: tuple[str, ...]
    """what was changed on the way, one line each"""
