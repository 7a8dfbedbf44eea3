"""Context of a forward pass, which holds everything that the layers need besides the hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megagpt.model.document_mask import DocumentMask
from megagpt.model.kv_cache import KVCache
from megagpt.model.parallel import SequenceShard
from megagpt.model.rotary import RotaryEmbedding
from megagpt.model.shapes import head_dim

if TYPE_CHECKING:
    from megagpt.config.recipe import ModelSection

_SMALLEST_FLEX_HEAD = 16  # smallest head_dim that flex attention's kernels support


@dataclass(frozen=True)
class ForwardContext:
    """Context that is passed to every layer of one forward pass.

    The context is immutable. A block that is recomputed in the backward pass therefore gets the same context as in the
    forward pass, even if forward passes of other batches have run in between, as in a pipeline.

    Attributes:
        position_ids: int64 position of each token, [T], or [B, T] if attention is masked at document boundaries
        rotary: cosine and sine of the rotary embedding at these positions, or None with learned positions
        attention_mask: mask from `DocumentMask.build`, or None if each query attends to all earlier tokens
        kv_cache: keys and values of earlier tokens in generation, or None in training

    """

    position_ids: Tensor
    rotary: tuple[Tensor, Tensor] | None = None
    attention_mask: Tensor | BlockMask | None = None
    kv_cache: KVCache | None = None


class ContextBuilder:
    """Builder of the contexts for the forward passes of one model.

    Args:
        section: model section of the recipe
        document_end: id of the token that ends a document. If given, attention is masked at document boundaries
        sequence: this rank's shard of each sequence, or None without sequence parallelism

    """

    def __init__(
        self, section: ModelSection, document_end: int | None = None, sequence: SequenceShard | None = None
    ) -> None:
        self._rotary: RotaryEmbedding | None = None
        if section.position == "rope":
            self._rotary = RotaryEmbedding(head_dim(section), section.seq_len, section.rope_theta)
        self._document_mask: DocumentMask | None = None
        if document_end is not None:
            # Flex attention does not support dropout.
            allow_blocks = section.dropout == 0 and head_dim(section) >= _SMALLEST_FLEX_HEAD
            self._document_mask = DocumentMask(document_end, allow_blocks)
        self._sequence = sequence

    def for_batch(self, input_ids: Tensor, device: torch.device | None = None) -> ForwardContext:
        """Build the context of a forward pass in training or evaluation.

        Collective if attention is masked at document boundaries under sequence parallelism.

        Args:
            input_ids: token ids [B, T] of this rank
            device: device of the layers. By default, the device of `input_ids`

        Returns:
            The context, with tensors on `device`.

        """
        device = input_ids.device if device is None else device
        tokens = input_ids.shape[1]
        start = 0 if self._sequence is None else self._sequence.index * tokens
        if self._document_mask is None:
            return self._contiguous(start, tokens, device)
        ids = input_ids.to(device, non_blocking=True)
        if self._sequence is not None:
            ids = self._sequence.gather(ids)
        position_ids, mask = self._document_mask.build(ids)
        position_ids = position_ids[:, start : start + tokens]
        rotary = None if self._rotary is None else self._rotary.at(position_ids)
        return ForwardContext(position_ids, rotary, mask)

    def for_decoding(self, tokens: int, kv_cache: KVCache, device: torch.device) -> ForwardContext:
        """Build the context for `tokens` new tokens that follow the tokens in `kv_cache`, all in the same document."""
        return self._contiguous(kv_cache.length, tokens, device, kv_cache)

    def _contiguous(
        self, start: int, tokens: int, device: torch.device, kv_cache: KVCache | None = None
    ) -> ForwardContext:
        position_ids = torch.arange(start, start + tokens, device=device)
        rotary = None if self._rotary is None else self._rotary.contiguous(start, tokens, device)
        return ForwardContext(position_ids, rotary, kv_cache=kv_cache)
