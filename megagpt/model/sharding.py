"""Split of each parameter under tensor parallelism, and conversion between whole tensors and shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megagpt.model.shapes import head_index, linear_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.config.recipe import ModelSection


@dataclass(frozen=True)
class ShardSpec:
    """Split of a parameter that consists of several sections. Each rank holds an equal part of every section.

    Attributes:
        dim: dimension that is split
        sections: sizes of the sections along `dim`, such as the queries, keys and values of a fused projection

    """

    dim: int
    sections: tuple[int, ...]

    def shard(self, whole: Tensor, index: int, degree: int) -> Tensor:
        """Return the shard of one rank as a new tensor.

        Args:
            whole: the whole parameter
            index: index of the rank in its tensor-parallel group
            degree: number of ranks in the group

        """
        import torch

        sections = torch.split(whole, list(self.sections), self.dim)
        return torch.cat([section.chunk(degree, self.dim)[index] for section in sections], self.dim)

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """Return the whole parameter, given the shards of all ranks in order."""
        import torch

        sizes = [size // len(shards) for size in self.sections]
        by_shard = [torch.split(shard, sizes, self.dim) for shard in shards]
        return torch.cat([part for section in zip(*by_shard, strict=True) for part in section], self.dim)


def shard_spec(name: str, section: ModelSection, degree: int) -> ShardSpec | None:
    """Return the split of a parameter under tensor parallelism.

    `linear_shapes` defines the split of the blocks' linear layers. The rows of the embedding and of the head are also
    split if their number is divisible by the degree.

    Args:
        name: name of the parameter in `GPT`
        section: model section of the recipe
        degree: number of tensor-parallel ranks

    Returns:
        The split, or None if every rank holds the whole parameter.

    """
    if degree == 1:
        return None
    if name in ("layers.0.weight", f"layers.{head_index(section)}.weight"):
        return None if section.vocab_size % degree else ShardSpec(0, (section.vocab_size,))
    layer, _, kind = name.rpartition(".")
    linear = linear_shapes(section).get(layer.split(".", 2)[-1])
    if linear is None:
        return None
    if linear.split == "column":
        return ShardSpec(0, linear.sections)
    return ShardSpec(1, linear.sections) if kind == "weight" else None  # each rank holds the whole bias
