"""Ulysses: sequences cut over ranks, heads exchanged for tokens around attention (arXiv 2309.14509).

To DeepSpeed these ranks are data-parallel ones, which is what they are outside attention: each adds the gradient
of its own tokens, and ZeRO cuts over all of them. Its own key `sequence_parallel_size` goes other ways, one of which
does not reduce gradients, and another wants a loss that is scaled differently at stage 3.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from deepspeed.sequence.layer import DistributedAttention
from torch import nn

from megagpt.config.deepspeed import Layout
from megagpt.data.loader import Batch
from megagpt.model.document_mask import Documents
from megagpt.model.layers import Attention, PositionEmbedding

_HEADS, _TOKENS = 2, 1  # dimensions of q, k and v


class Ulysses:
    """This rank's part of every sequence, and the ranks that hold the others. Made on all ranks together."""

    def __init__(self, layout: Layout, rank: int) -> None:
        self._degree, step = layout.sequence_parallel, layout.tensor_parallel
        self._index = rank // step % self._degree
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
        return Batch(*(tensor.chunk(self._degree, dim=1)[self._index] for tensor in batch))

    def connect(self, module: nn.Module, documents: Documents | None, seq_len: int) -> None:
        """Tell the layers in `module` where their tokens begin, and let attention see those of all ranks."""
        if self._degree == 1:
            return
        first = self._index * (seq_len // self._degree)
        if documents is not None:
            documents.first = first
            documents.whole = self._whole  # type: ignore[method-assign]
        for part in module.modules():
            if isinstance(part, PositionEmbedding):
                part.first = first
            elif isinstance(part, Attention):
                if part.rotary is not None:
                    part.rotary.first = first
                exchange = DistributedAttention(part.attend, self._group, scatter_idx=_HEADS, gather_idx=_TOKENS)
                part.attend = partial(exchange, batch_dim_idx=0)  # type: ignore[method-assign]

    def _whole(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The columns of all ranks side by side [batch, seq]; collective."""
        parts = [torch.empty_like(input_ids) for _ in range(self._degree)]
        torch.distributed.all_gather(parts, input_ids.contiguous(), group=self._group)
        return torch.cat(parts, dim=1)
