"""What the layers of a GPT need from tensor and sequence parallelism. The engine implements it over process groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from megagpt.model.shapes import LinearShape


class VocabShard(Protocol):
    """The rows of a vocabulary matrix that one tensor-parallel rank holds, and the collectives of its group."""

    start: int
    """token id of this rank's first row"""
    rows: int
    """number of rows per rank"""

    def sum(self, x: Tensor) -> Tensor:
        """Sum x over the ranks in place. Not differentiable."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """Take the maximum of x over the ranks in place. Not differentiable."""
        ...

    def reduce(self, x: Tensor) -> Tensor:
        """Sum x over the ranks. The gradient of the sum is the gradient of each rank's x."""
        ...


class SequenceShard(Protocol):
    """The consecutive tokens of every sequence that one sequence-parallel rank holds."""

    index: int
    """number of this rank's shard"""

    def gather(self, input_ids: Tensor) -> Tensor:
        """Return the whole sequences [B, S] of the shards' input_ids [B, T]. Collective."""
        ...

    def distribute(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wrap `attend`, which works on whole sequences, so that it takes and returns this rank's tokens."""
        ...


def whole_linear(shape: LinearShape, bias: bool) -> nn.Linear:
    """Return a linear layer that is not split."""
    return nn.Linear(shape.in_features, shape.out_features, bias=bias)


@dataclass(frozen=True)
class ParallelLayers:
    """How the layers of this rank work together with those of other ranks; by default they are whole.

    Attributes:
        linear: builds a linear layer of a block, or this rank's shard of it
        vocabulary: this rank's rows of the embedding and of the head; None if they are not split
        sequence: this rank's part of each sequence; None if sequences are not split

    """

    linear: Callable[[LinearShape, bool], nn.Linear] = whole_linear
    vocabulary: VocabShard | None = None
    sequence: SequenceShard | None = None


WHOLE = ParallelLayers()
