"""Small numbers and texts agreed between all ranks, over gloo."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

TIME_LIMIT = timedelta(minutes=20)  # of every process group: a dead peer ends the job, it never hangs it


class Agreement:
    """Small numbers agreed between all ranks, over gloo: host memory only, no device is waited for."""

    def __init__(self, world_size: int) -> None:
        self._group: Any = None
        if world_size > 1:
            import torch.distributed

            self._group = torch.distributed.new_group(backend="gloo", timeout=TIME_LIMIT)

    def total(self, value: float) -> float:
        """The sum of `value` over the ranks (exact for whole numbers below 2^53)."""
        if self._group is None:
            return value
        import torch

        tensor = torch.tensor([value], dtype=torch.float64)
        torch.distributed.all_reduce(tensor, group=self._group)
        return float(tensor.item())

    def totals(self, values: Sequence[int]) -> list[int]:
        """The sums of whole numbers over the ranks, modulo 2^64."""
        if self._group is None:
            return [value % (1 << 64) for value in values]
        import torch

        signed = [(value + (1 << 63)) % (1 << 64) - (1 << 63) for value in values]
        tensor = torch.tensor(signed, dtype=torch.int64)
        torch.distributed.all_reduce(tensor, group=self._group)
        return [value % (1 << 64) for value in tensor.tolist()]

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each whole number over the ranks, between -2^63 and 2^63."""
        if self._group is None:
            return list(values)
        import torch

        tensor = torch.tensor(values, dtype=torch.int64)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self._group)
        return [int(value) for value in tensor]

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, in their order, on every rank."""
        if self._group is None:
            return [text]
        import torch.distributed

        texts = [""] * torch.distributed.get_world_size(self._group)
        torch.distributed.all_gather_object(texts, text, group=self._group)
        return texts

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it holds on at least one rank; one exchange for all."""
        return [count > 0 for count in self.totals([int(flag) for flag in flags])]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.total(0.0)
