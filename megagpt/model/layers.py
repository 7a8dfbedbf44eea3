"""Layers of a GPT: embeddings, MLP, normalization, block and head. Attention is in attention.py.

The letters in shapes are B for the batch size, T for tokens, D for the width (d_model), H for query heads, K for
key/value heads and h for head_dim. Layers do not store their number of heads but reshape by head_dim, so that the same
code works for a tensor-parallel shard of a layer. Every layer maps hidden states [B, T, D] to hidden states [B, T, D],
given the context of the forward pass, except that the input of the first layer is token ids [B, T] and the output of
the head is logits [B, T, vocab_size] or the loss.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from megagpt.model.activations import Activation
from megagpt.model.attention import EPSILON, Attention, apply_dropout
from megagpt.model.context import ForwardContext
from megagpt.model.fused_ops import rms_norm
from megagpt.model.loss import cross_entropy_sum, project
from megagpt.model.parallel import VocabShard


class TokenEmbedding(nn.Module):
    """Embedding of token ids. The matrix is its only parameter, so that a pipeline can tie it to the head.

    Args:
        vocab_size: number of token ids
        d_model: width D of the hidden states
        dropout: probability of dropping an element of the result
        shard: rows of the matrix that this tensor-parallel rank holds, or None if it holds all rows

    """

    def __init__(self, vocab_size: int, d_model: int, dropout: float = 0.0, shard: VocabShard | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size if shard is None else shard.rows, d_model))
        self.dropout = dropout
        self._shard = shard

    def forward(self, input_ids: Tensor, context: ForwardContext) -> Tensor:
        """Return the embeddings [B, T, D] of token ids [B, T], after dropout."""
        return apply_dropout(self._rows(input_ids), self.dropout, self.training)

    def _rows(self, input_ids: Tensor) -> Tensor:
        if self._shard is None:
            return F.embedding(input_ids, self.weight)
        local_ids = input_ids - self._shard.start
        on_other_rank = (local_ids < 0) | (local_ids >= len(self.weight))
        rows = F.embedding(local_ids.masked_fill(on_other_rank, 0), self.weight)
        return self._shard.reduce(rows.masked_fill(on_other_rank.unsqueeze(-1), 0))


class PositionEmbedding(nn.Module):
    """Learned position embedding, which is added to the hidden states before dropout, as in GPT-2."""

    def __init__(self, seq_len: int, d_model: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(seq_len, d_model))
        self.dropout = dropout

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Return the sum of hidden states [B, T, D] and the embeddings of their positions, after dropout."""
        return apply_dropout(hidden + F.embedding(context.position_ids, self.weight), self.dropout, self.training)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension: x / rms(x) · weight (arXiv 1910.07467)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, hidden: Tensor, context: ForwardContext | None = None) -> Tensor:
        """Normalize hidden states [B, T, D]."""
        if hidden.device.type == "cpu":
            return rms_norm(hidden, self.weight, EPSILON)
        return F.rms_norm(hidden, self.weight.shape, self.weight, EPSILON)  # a single kernel on GPUs


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, with weight and bias (arXiv 1607.06450)."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, eps=EPSILON)

    def forward(self, hidden: Tensor, context: ForwardContext | None = None) -> Tensor:
        """Normalize hidden states [B, T, D]."""
        return super().forward(hidden)


class MLP(nn.Module):
    """MLP that consists of the linear layer `up`, an activation function and the linear layer `down`.

    A gated activation function has a second input, the output of the linear layer `gate`. The linear layers may be
    tensor-parallel shards.
    """

    def __init__(
        self, activation: Activation, *, gate: nn.Linear | None, up: nn.Linear, down: nn.Linear, dropout: float
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate = gate
        self.up = up
        self.down = down
        self.dropout = dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the MLP and dropout to hidden states [B, T, D], and return hidden states [B, T, D]."""
        up = self.up(hidden)
        gate = None if self.gate is None else self.gate(hidden)
        return apply_dropout(self.down(self.activation.function(up, gate)), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm residual block of attention followed by an MLP.

    If `recompute` is "yes" or "from host", only the input of the block is kept for the backward pass, which computes
    everything else again (arXiv 1604.06174). With "from host", the input is kept in host memory.
    """

    def __init__(self, attention_norm: nn.Module, attention: Attention, mlp_norm: nn.Module, mlp: MLP) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.recompute: Literal["no", "yes", "from host"] = "no"

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Apply the block to hidden states [B, T, D], and return hidden states [B, T, D]."""
        if self.recompute == "no" or not torch.is_grad_enabled():
            return self._run(hidden, context)
        with save_on_cpu(pin_memory=hidden.is_cuda) if self.recompute == "from host" else nullcontext():
            output: Tensor = checkpoint(self._run, hidden, context, use_reentrant=False)
        return output

    def _run(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), context)
        output: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return output


class Head(nn.Module):
    """Projection of hidden states to logits, with a separate matrix or with the matrix of the token embedding.

    Args:
        vocab_size: number of token ids
        d_model: width D of the hidden states
        softcap: bound of the logits, as in `project`
        tied: token embedding whose matrix the head uses, or None if the head has a separate matrix
        shard: rows of the matrix that this tensor-parallel rank holds, or None if it holds all rows

    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        softcap: float | None,
        tied: TokenEmbedding | None,
        shard: VocabShard | None = None,
    ) -> None:
        super().__init__()
        self.softcap = softcap
        self._shard = shard
        # The embedding is stored in a tuple, so that torch does not register it as a submodule a second time.
        self._tied = None if tied is None else (tied,)
        if tied is None:
            self.weight = nn.Parameter(torch.empty(vocab_size if shard is None else shard.rows, d_model))

    def matrix(self) -> Tensor:
        """Return the projection matrix [vocab_size, D], or this rank's rows of it."""
        return self.weight if self._tied is None else self._tied[0].weight

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits, or the loss if labels are given.

        Args:
            hidden: hidden states [B, T, D]
            labels: ids of the next tokens [B, T]

        Returns:
            Without labels, the logits [B, T, vocab_size], or only the logits of this rank's rows. With labels, the
            summed loss, a scalar, which is computed without storing all logits at once.

        """
        if labels is None:
            return project(hidden, self.matrix(), self.softcap)
        return cross_entropy_sum(hidden, self.matrix(), labels, self.softcap, self._shard)
