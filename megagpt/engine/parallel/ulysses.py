"""Ulysses: sequences cut over ranks, heads exchanged for tokens around attention (arXiv 2309.14509).

To DeepSpeed these ranks are data-parallel ones, which is what they are outside attention: each adds the gradient
of its own tokens, and ZeRO cuts over all of them. Its own key `sequence_parallel_size` goes other ways, one of which
does not reduce gradients, and another wants a loss that is scaled differently at stage 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from deepspeed.sequence.layer import DistributedAttention

from megagpt.config.deepspeed import Layout
from megagpt.data.loader import Batch
from megagpt.model.parallel import SequenceShard

_HEADS, _TOKENS = 2, 1  # dimensions of q, k and v


class Ulysses:
    """This rank's part of every sequence, and the ranks that hold the others. Made on all ranks together."""

    def __init__(self, layout: Layout, rank: int) -> None:
        self._degree, step = layout.sequence_parallel, layout.tensor_parallel
        self.index = rank // step % self._degree
        self._group: Any = None
        if self._degree == 1:
            return
        for first in range(0, layout.world_size, self._degree * step):
            for start in range(first, first + step):
                members = range(start, start + self._degree * step, step)
                group = torch.distributed.new_group(list(members))
                if rank in members:
                    self._group = group

    def part(self, batch: Batch) -> Batch:
        """This rank's columns [batch, seq / degree] of a batch."""
        return Batch(*(tensor.chunk(self._degree, dim=1)[self.index] for tensor in batch))

    @property
    def shard(self) -> SequenceShard | None:
        """What the layers need to know of this; None where sequences are whole."""
        return None if self._degree == 1 else self

    def distribute(self, attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """See `SequenceShard`."""
        exchange = DistributedAttention(attend, self._group, scatter_idx=_HEADS, gather_idx=_TOKENS)
        return partial(exchange, batch_dim_idx=0)

    def gather(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `SequenceShard`."""
        parts = [torch.empty_like(input_ids) for _ in range(self._degree)]
        torch.distributed.all_gather(parts, input_ids.contiguous(), group=self._group)
        return torch.cat(parts, dim=1)
