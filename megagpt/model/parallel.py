"""Interfaces of tensor and sequence parallelism for the layers of a GPT. megagpt.engine.parallel implements them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from megagpt.model.shapes import LinearShape


class VocabShard(Protocol):
    """The rows of a vocabulary matrix that one tensor-parallel rank holds, and the collectives of its group."""

    start: int
    """token id that corresponds to the first row of this rank"""
    rows: int
    """number of rows that each rank holds"""

    def sum(self, x: Tensor) -> Tensor:
        """Sum x over the ranks in place, and return it. Not differentiable."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """Replace x in place by its maximum over the ranks, and return it. Not differentiable."""
        ...

    def reduce(self, x: Tensor) -> Tensor:
        """Return the sum of x over the ranks. The gradient of the sum is passed on to x on each rank."""
        ...


class SequenceShard(Protocol):
    """Shard of every sequence that one sequence-parallel rank holds, which consists of consecutive tokens."""

    index: int
    """index of this rank's shard"""

    def gather(self, input_ids: Tensor) -> Tensor:
        """Gather the token ids [B, T] of all shards, and return whole sequences [B, S]. Collective."""
        ...

    def distribute(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a function that applies `attend` to whole sequences, given this rank's tokens on every rank.

        The inputs and outputs of the returned function are shards, while those of `attend` are whole sequences.
        """
        ...


def whole_linear(shape: LinearShape, bias: bool) -> nn.Linear:
    """Return a linear layer that is not split over ranks."""
    return nn.Linear(shape.in_features, shape.out_features, bias=bias)


@dataclass(frozen=True)
class ParallelLayers:
    """Settings with which a rank builds its shards of the layers. By default, the layers are not split.

    Attributes:
        linear: function that builds a linear layer of a block, or this rank's shard of it
        vocabulary: this rank's rows of the embedding and of the head, or None if they are not split
        sequence: this rank's shard of each sequence, or None if sequences are not split

    """

    linear: Callable[[LinearShape, bool], nn.Linear] = whole_linear
    vocabulary: VocabShard | None = None
    sequence: SequenceShard | None = None


WHOLE = ParallelLayers()
