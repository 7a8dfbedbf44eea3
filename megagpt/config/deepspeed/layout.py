"""The layout of a run, which defines how its model and global batch are distributed over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megagpt.config.recipe import Recipe


@dataclass(frozen=True)
class Layout:
    """World size, parallelism degrees, ZeRO stage, and the split of the global batch.

    Consecutive ranks differ first in their tensor-parallel part, then in their sequence-parallel part, data-parallel
    replica and pipeline stage.
    """

    world_size: int
    data_parallel: int
    micro_batch: int
    """number of samples in one forward pass of a data-parallel replica"""
    accumulation: int
    """number of micro-batches per update of each data-parallel replica"""
    zero_stage: int
    pipeline_stages: int = 1
    tensor_parallel: int = 1
    sequence_parallel: int = 1
    recomputed_blocks: int = 0
    """number of evenly spaced transformer blocks whose activations are recomputed in the backward pass"""
    activations_on_host: bool = False
    """whether the saved inputs of recomputed blocks are kept in host memory"""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Layout:
        """Restore a layout from the fields in a checkpoint's manifest. Unknown fields are ignored."""
        known = {field.name for field in fields(cls)}
        defaults = {"data_parallel": 1, "micro_batch": 1, "accumulation": 1}
        return cls(**{**defaults, **{name: value for name, value in record.items() if name in known}})

    @property
    def zero_partitions(self) -> int:
        """Number of ranks over which ZeRO partitions states: data-parallel replicas times sequence-parallel parts."""
        return self.data_parallel * self.sequence_parallel

    @property
    def pipeline_bubble(self) -> float:
        """Fraction of time that a pipeline stage is idle: (p - 1) / (m + p - 1) for p stages and m micro-batches."""
        return (self.pipeline_stages - 1) / (self.accumulation + self.pipeline_stages - 1)

    @property
    def parallelism(self) -> str:
        """Description of how the model is split, such as "2 pipeline stages, tensor parallel 4"; "" if it is not."""
        parts = []
        if self.pipeline_stages > 1:
            parts.append(f"{self.pipeline_stages} pipeline stages")
        if self.tensor_parallel > 1:
            parts.append(f"tensor parallel {self.tensor_parallel}")
        if self.sequence_parallel > 1:
            parts.append(f"sequence parallel {self.sequence_parallel}")
        return ", ".join(parts)

    @property
    def sharding(self) -> str:
        """Description of how model and optimizer are split, such as "2 pipeline stages, ZeRO stage 1"."""
        zero = f"ZeRO stage {self.zero_stage}"
        return f"{self.parallelism}, {zero}" if self.parallelism else zero

    @property
    def batch_product(self) -> str:
        """Description of how the global batch is split, such as "8 × 4 × 2" (replicas × micro-batch × accumulation)."""
        return f"{self.data_parallel} × {self.micro_batch} × {self.accumulation}"

    def __str__(self) -> str:
        return f"{self.world_size} {'rank' if self.world_size == 1 else 'ranks'}, {self.sharding}"

    def data_rank(self, rank: int) -> int:
        """Return the index of the data-parallel replica that a rank belongs to.

        All ranks of one replica read the same samples.
        """
        return rank // (self.tensor_parallel * self.sequence_parallel) % self.data_parallel


@dataclass(frozen=True)
class Resolved:
    """A DeepSpeed config in which every "auto" is replaced by a value, and the layout that follows from it."""

    config: dict[str, Any]
    """the config for `deepspeed.initialize`, without optimizer and schedule, which are passed as objects"""
    layout: Layout
    recipe: Recipe
    """the recipe, with its precision filled in"""
    notes: tuple[str, ...]
    """messages for the user about changed or noteworthy settings, one line each"""
