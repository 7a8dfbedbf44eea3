"""Ulysses sequence parallelism, which shards each sequence over several ranks (arXiv 2309.14509).

Around attention, these ranks exchange data, so that each computes all tokens of some heads. DeepSpeed treats them as
data-parallel ranks. This is correct outside attention, where each rank contributes the gradient of its own tokens and
ZeRO partitions states over all of them. DeepSpeed's key `sequence_parallel_size` is not used. One of the code paths
that it enables does not reduce gradients, and another one needs a differently scaled loss at stage 3.
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

_HEADS, _TOKENS = 2, 1  # the dimensions of heads and tokens in q, k and v


class Ulysses:
    """A `SequenceShard` whose collectives run over the process group of the ranks that share each sequence.

    The constructor is collective, because it creates the process groups of all ranks.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        self._degree = layout.sequence_parallel
        stride = layout.tensor_parallel  # difference between successive ranks of a sequence-parallel group
        self.index = rank // stride % self._degree
        self._group: Any = None
        if self._degree == 1:
            return
        for block in range(0, layout.world_size, self._degree * stride):
            for start in range(block, block + stride):
                members = range(start, start + self._degree * stride, stride)
                group = torch.distributed.new_group(list(members))
                if rank in members:
                    self._group = group

    def shard_batch(self, batch: Batch) -> Batch:
        """Return this rank's columns [batch, seq / degree] of a batch."""
        return Batch(*(tensor.chunk(self._degree, dim=1)[self.index] for tensor in batch))

    @property
    def shard(self) -> SequenceShard | None:
        """This object, or None if sequences are not sharded."""
        return None if self._degree == 1 else self

    def distribute(self, attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """See `SequenceShard`."""
        distributed = DistributedAttention(attend, self._group, scatter_idx=_HEADS, gather_idx=_TOKENS)
        return partial(distributed, batch_dim_idx=0)

    def gather(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `SequenceShard`."""
        shards = [torch.empty_like(input_ids) for _ in range(self._degree)]
        torch.distributed.all_gather(shards, input_ids.contiguous(), group=self._group)
        return torch.cat(shards, dim=1)
