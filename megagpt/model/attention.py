"""Causal self-attention with grouped queries. Letters in shapes are explained in layers.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from megagpt.model.context import ForwardContext
from megagpt.model.document_mask import attend_in_blocks
from megagpt.model.fused_ops import split_heads
from megagpt.model.parallel import SequenceShard

EPSILON = 1e-5  # of every norm


class Attention(nn.Module):
    """Causal attention in which `group` query heads share one key/value head.

    The rows of `qkv` are all query heads, then all key heads, then all value heads.

    Args:
        layer: number of this attention layer, which finds its keys and values in a KV cache
        qkv: linear layer from D to (H + 2K)·h, or this tensor-parallel rank's shard of it
        output: linear layer from H·h to D, or this rank's shard of it
        head_dim: h
        group: H / K
        dropout: probability of dropping an attention weight, and of dropping an output
        qk_norm: divide each query and key head by its RMS before the rotation, without a weight (arXiv 2010.04245)
        sequence: this rank's part of each sequence under sequence parallelism

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
        """From hidden [B, T, D] to hidden [B, T, D]."""
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
        """Mix the values of the tokens that each query attends to.

        Args:
            q: [B, T, H, h]
            k: [B, S, K, h]; S is T, or T is 1
            v: [B, S, K, h]
            is_causal: each query attends to earlier tokens only; False if T is 1 and the query attends to all S
            mask: replaces the causal mask; see `DocumentMask.build`

        Returns:
            [B, T, H, h]

        """
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if isinstance(mask, BlockMask):
            return attend_in_blocks(q, k, v, mask).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        is_grouped = self.group > 1
        if is_grouped and q.is_cuda and (mask is not None or q.dtype == torch.float32):
            # On GPUs only flash attention supports groups, and it supports neither masks nor fp32. The fallback kernel
            # would hold all attention scores in memory.
            k, v = (tensor.repeat_interleave(self.group, 1) for tensor in (k, v))
            is_grouped = False
        is_causal = is_causal and mask is None
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=is_grouped)
        return mixed.transpose(1, 2)


def apply_dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Drop out elements of x in training; return x itself if there is nothing to drop."""
    return F.dropout(x, probability) if training and probability > 0 else x
