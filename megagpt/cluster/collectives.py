"""Collectives between all ranks on small host values (flags, counts and plain objects), over gloo."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from megagpt.files import parse_json

# Timeout of every process group. If a rank dies, the job ends after this time instead of hanging.
TIME_LIMIT = timedelta(minutes=20)


class Collectives:
    """Collectives between all ranks on small host values. They use gloo, so no device has to be synchronized.

    All ranks must call the same methods in the same order. With one rank, every method returns its own input.

    Args:
        world_size: total number of ranks. If there are several, the default process group must exist.
    """

    def __init__(self, world_size: int) -> None:
        self._group: Any = None
        if world_size > 1:
            import torch.distributed

            self._group = torch.distributed.new_group(backend="gloo", timeout=TIME_LIMIT)

    def all_reduce_sum(self, value: float) -> float:
        """Return the sum of `value` over all ranks. The sum is exact for whole numbers below 2^53."""
        if self._group is None:
            return value
        import torch

        tensor = torch.tensor([value], dtype=torch.float64)
        torch.distributed.all_reduce(tensor, group=self._group)
        return float(tensor.item())

    def all_reduce_sum_integers(self, values: Sequence[int]) -> list[int]:
        """Return the elementwise sum of whole numbers over all ranks, modulo 2^64."""
        if self._group is None:
            return [value % (1 << 64) for value in values]
        import torch

        signed = [(value + (1 << 63)) % (1 << 64) - (1 << 63) for value in values]
        tensor = torch.tensor(signed, dtype=torch.int64)
        torch.distributed.all_reduce(tensor, group=self._group)
        return [value % (1 << 64) for value in tensor.tolist()]

    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        """Return the elementwise maximum of `values` over all ranks. The values must be 64-bit signed integers."""
        if self._group is None:
            return list(values)
        import torch

        tensor = torch.tensor(values, dtype=torch.int64)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self._group)
        return [int(value) for value in tensor]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values of all ranks in rank order, on every rank.

        Values must be plain data. They are sent as JSON, so tuples arrive as lists, even with one rank.
        """
        text = json.dumps(value)
        texts = [text]
        if self._group is not None:
            import torch.distributed

            texts = [""] * torch.distributed.get_world_size(self._group)
            torch.distributed.all_gather_object(texts, text, group=self._group)
        return [parse_json(text) for text in texts]

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on at least one rank."""
        return self.all_reduce_sum(float(flag)) > 0

    def barrier(self) -> None:
        """Wait until all ranks have called this method."""
        self.all_reduce_sum(0.0)
