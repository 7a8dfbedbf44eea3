"""Causal self-attention with grouped queries. The docstring of layers.py explains the letters in shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from megagpt.model.context import ForwardContext
from megagpt.model.document_mask import attend_in_blocks
from megagpt.model.fused_ops import split_heads
from megagpt.model.parallel import SequenceShard

EPSILON = 1e-5  # epsilon of every normalization layer


class Attention(nn.Module):
    """Causal attention in which `group` query heads share one key/value head.

    The rows of the weight of `qkv` are all query heads, followed by all key heads and all value heads.

    Args:
        layer: index of this attention layer in a KV cache
        qkv: linear layer from D to (H + 2K)·h, or this tensor-parallel rank's shard of it
        output: linear layer from H·h to D, or this tensor-parallel rank's shard of it
        head_dim: width h of each head
        group: number of query heads per key/value head, H / K
        dropout: probability of dropping each attention weight and each element of the output
        qk_norm: whether to divide each query and key head by its RMS before the rotation (arXiv 2010.04245)
        sequence: this rank's shard of each sequence, or None without sequence parallelism

    """

    def __init__(
        self,
        layer: int,
        qkv: nn.Linear,
        output: nn.Linear,
        *,
        head_dim: int,
        group: int,
        dropout: float,
        qk_norm: bool,
        sequence: SequenceShard | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = head_dim
        self.group = group
        self.dropout = dropout
        self.qk_norm = qk_norm
        self.qkv = qkv
        self.output = output
        self._distributed = None if sequence is None else sequence.distribute(self.attend)

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Apply attention to hidden states [B, T, D], and return hidden states [B, T, D]."""
        qkv = self.qkv(hidden).unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2K, h]
        kv_heads = qkv.shape[2] // (self.group + 2)
        q, k, v = split_heads(qkv, kv_heads, context.rotary, EPSILON if self.qk_norm else None)
        cache = context.kv_cache
        is_causal = cache is None or cache.length == 0
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        attend = self.attend if self._distributed is None else self._distributed
        mixed = attend(q, k, v, is_causal=is_causal, mask=context.attention_mask)
        return apply_dropout(self.output(mixed.flatten(2)), self.dropout, self.training)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True, mask: Tensor | BlockMask | None = None
    ) -> Tensor:
        """Compute scaled dot-product attention.

        Args:
            q: queries [B, T, H, h]
            k: keys [B, S, K, h], where S is T unless T is 1
            v: values [B, S, K, h]
            is_causal: whether a query attends only to its own and earlier tokens. If False, T is 1 and the query
                attends to all S tokens
            mask: mask that replaces the causal mask, as returned by `DocumentMask.build`

        Returns:
            For each query, the weighted mean of the values that it attends to: [B, T, H, h].

        """
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if isinstance(mask, BlockMask):
            return attend_in_blocks(q, k, v, mask).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        is_grouped = self.group > 1
        if is_grouped and q.is_cuda and (mask is not None or q.dtype == torch.float32):
            # On GPUs only flash attention supports grouped queries, and it supports neither masks nor fp32. For these,
            # torch would select a kernel that stores all attention scores in memory.
            k, v = (tensor.repeat_interleave(self.group, 1) for tensor in (k, v))
            is_grouped = False
        is_causal = is_causal and mask is None
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=is_grouped)
        return mixed.transpose(1, 2)


def apply_dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Apply dropout to x in training. In evaluation, or if the probability is 0, return x itself."""
    return F.dropout(x, probability) if training and probability > 0 else x
