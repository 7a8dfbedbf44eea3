"""The layers of a GPT: embeddings, MLP, norms, block, head. Attention is in attention.py.

Letters in shapes: B batch, T tokens, D width (d_model), H heads, K key/value heads, h head_dim. Layers do not store
their number of heads but reshape by head_dim, so that a tensor-parallel shard of a layer works unchanged. Every
layer maps hidden [B, T, D] to hidden [B, T, D], given the context of the forward pass. The first layer takes token ids
[B, T], and the head returns logits [B, T, vocab_size] or the loss.
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
    """Token ids [B, T] → hidden [B, T, D]. Holds only the matrix, so that a pipeline can tie it.

    Args:
        vocab_size: number of token ids
        d_model: D
        dropout: probability of dropping an element of the result
        shard: this tensor-parallel rank's rows; None for all rows

    """

    def __init__(self, vocab_size: int, d_model: int, dropout: float = 0.0, shard: VocabShard | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size if shard is None else shard.rows, d_model))
        self.dropout = dropout
        self._shard = shard

    def forward(self, input_ids: Tensor, context: ForwardContext) -> Tensor:
        """Look up the rows of input_ids [B, T]."""
        return apply_dropout(self._rows(input_ids), self.dropout, self.training)

    def _rows(self, input_ids: Tensor) -> Tensor:
        if self._shard is None:
            return F.embedding(input_ids, self.weight)
        local_ids = input_ids - self._shard.start
        on_other_rank = (local_ids < 0) | (local_ids >= len(self.weight))
        rows = F.embedding(local_ids.masked_fill(on_other_rank, 0), self.weight)
        return self._shard.reduce(rows.masked_fill(on_other_rank.unsqueeze(-1), 0))


class PositionEmbedding(nn.Module):
    """Adds a learned vector for each token position (as GPT-2), then applies dropout."""

    def __init__(self, seq_len: int, d_model: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(seq_len, d_model))
        self.dropout = dropout

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """From hidden [B, T, D] to hidden [B, T, D]."""
        return apply_dropout(hidden + F.embedding(context.position_ids, self.weight), self.dropout, self.training)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, hidden: Tensor, context: ForwardContext | None = None) -> Tensor:
        """From hidden [B, T, D] to hidden [B, T, D]."""
        if hidden.device.type == "cpu":
            return rms_norm(hidden, self.weight, EPSILON)
        return F.rms_norm(hidden, self.weight.shape, self.weight, EPSILON)  # one kernel on GPUs


class LayerNorm(nn.LayerNorm):
    """Mean 0 and variance 1 over the last dimension, then weight and bias."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, eps=EPSILON)

    def forward(self, hidden: Tensor, context: ForwardContext | None = None) -> Tensor:
        """From hidden [B, T, D] to hidden [B, T, D]."""
        return super().forward(hidden)


class MLP(nn.Module):
    """Linear layer, activation, linear layer. A gated activation has a second first layer, `gate`.

    The linear layers may be shards of a tensor-parallel rank.
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
        """From hidden [B, T, D] to hidden [B, T, D]."""
        up = self.up(hidden)
        gate = None if self.gate is None else self.gate(hidden)
        return apply_dropout(self.down(self.activation.function(up, gate)), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP.

    With `recompute` only the block's input is kept for the backward pass (in host memory if "from host"), and
    everything else is computed again there (arXiv 1604.06174).
    """

    def __init__(self, attention_norm: nn.Module, attention: Attention, mlp_norm: nn.Module, mlp: MLP) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.recompute: Literal["no", "yes", "from host"] = "no"

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """From hidden [B, T, D] to hidden [B, T, D]."""
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
    """Projects hidden [B, T, D] to the vocabulary, with a matrix of its own or that of the token embedding.

    Args:
        vocab_size: number of token ids
        d_model: D
        softcap: bound of the logits; see `project`
        tied: the embedding whose matrix the head uses; None for a matrix of its own
        shard: this tensor-parallel rank's rows; None for all rows

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
        self._tied = None if tied is None else (tied,)  # in a tuple, so that the module is not registered twice
        if tied is None:
            self.weight = nn.Parameter(torch.empty(vocab_size if shard is None else shard.rows, d_model))

    def matrix(self) -> Tensor:
        """Return the projection [vocab_size, D], or this rank's rows of it."""
        return self.weight if self._tied is None else self._tied[0].weight

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits, or the loss if labels are given.

        Args:
            hidden: [B, T, D]
            labels: [B, T]

        Returns:
            Logits [B, T, vocab_size] (of this rank's rows only, if there is a shard); with labels the summed loss, a
            scalar, without allocating all logits.

        """
        if labels is None:
            return project(hidden, self.matrix(), self.softcap)
        return cross_entropy_sum(hidden, self.matrix(), labels, self.softcap, self._shard)
