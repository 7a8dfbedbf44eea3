"""The layers of a GPT: embeddings, blocks of attention and MLP, norm, head.

Letters in shapes: B batch, T tokens, D width (d_model), H heads, K key/value heads, h head_dim. No layer
knows its number of heads by heart: it reshapes by head_dim, so that a tensor-parallel shard of it works as
it is. Every layer maps hidden [B, T, D] to hidden [B, T, D]; the first takes token ids [B, T], the head
returns logits [B, T, vocab_size].
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from megagpt.model import document_mask
from megagpt.model.document_mask import Bounds, Documents
from megagpt.model.fused_ops import relu_squared, rms_norm, split_heads
from megagpt.model.loss import Share, cross_entropy_sum, project

EPSILON = 1e-5  # of every norm


class Past:
    """What one layer remembers of the tokens it has read, for generation: their keys and values.

    `capacity` tokens at most; `seen` is the number read so far.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seen = 0
        self._kept: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values [B, T, K, h] of new tokens; return those of all tokens so far."""
        batch, tokens, heads, width = keys.shape
        if self._kept is None:
            room = keys.new_empty(2, batch, self.capacity, heads, width)
            self._kept = (room[0], room[1])
        for kept, new in zip(self._kept, (keys, values), strict=True):
            kept[:, self.seen : self.seen + tokens] = new
        self.seen += tokens
        return self._kept[0][:, : self.seen], self._kept[1][:, : self.seen]


class Rotary:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) in Llama's rotate-half form.

    Not a module: its tables are no state, are made on first use on the device that asks, and are shared by
    all blocks, so that neither a cast to bf16 nor the meta device touches them.
    """

    def __init__(self, head_dim: int, seq_len: int, theta: float) -> None:
        self.head_dim, self.seq_len, self.theta = head_dim, seq_len, theta
        self.first = 0  # position of the first token here, where sequences are cut over ranks
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def tables(self, start: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each [tokens, 1, head_dim / 2], fp32, of the token positions from `start` on."""
        if device not in self._tables:
            with torch.inference_mode(False):  # tables made while evaluating must serve training too
                exponents = torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim
                places = torch.arange(self.seq_len, device=device).float()
                angles = torch.outer(places, 1.0 / self.theta**exponents).unsqueeze(1)
                self._tables[device] = (angles.cos(), angles.sin())
        cosine, sine = self._tables[device]
        start += self.first
        return cosine[start : start + tokens], sine[start : start + tokens]

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each [B, T, 1, head_dim / 2], fp32, of the token positions [B, T]."""
        cosine, sine = self.tables(-self.first, self.seq_len, places.device)
        return cosine[places], sine[places]


class TokenEmbedding(nn.Embedding):
    """Token ids [B, T] → hidden [B, T, D]. Holds the matrix alone, so that a pipeline can tie it."""

    def __init__(self, vocab_size: int, d_model: int, dropout: float = 0.0) -> None:
        super().__init__(vocab_size, d_model)
        self.dropout = dropout
        self.share: Share | None = None  # set where the rows are cut over ranks

    def reset_parameters(self) -> None:
        """Draw nothing: `gpt.initialize` does."""

    def forward(self, input_ids: Tensor, past: Past | None = None) -> Tensor:
        """Look up the rows of input_ids [B, T]."""
        return _drop(self._rows(input_ids), self.dropout, self.training)

    def _rows(self, input_ids: Tensor) -> Tensor:
        if self.share is None:
            return super().forward(input_ids)
        mine = input_ids - self.share.first
        elsewhere = (mine < 0) | (mine >= len(self.weight))
        rows = super().forward(mine.masked_fill(elsewhere, 0))
        return self.share.join(rows.masked_fill(elsewhere.unsqueeze(-1), 0))


class PositionEmbedding(nn.Embedding):
    """Adds a learned vector for each token position (as GPT-2) and drops out the sum."""

    def __init__(self, seq_len: int, d_model: int, dropout: float) -> None:
        super().__init__(seq_len, d_model)
        self.dropout = dropout
        self.first = 0  # position of the first token here, where sequences are cut over ranks
        self.documents: Documents | None = None

    def reset_parameters(self) -> None:
        """Draw nothing: `gpt.initialize` does."""

    def forward(self, hidden: Tensor, past: Past | None = None) -> Tensor:
        """From hidden [B, T, D] to hidden [B, T, D]."""
        start, tokens = self.first, hidden.shape[1]
        if past is not None:
            start = past.seen
            past.seen += tokens
        elif self.documents is not None and self.documents.now is not None:
            placed = super().forward(self.documents.now.places)
            return _drop(hidden + placed, self.dropout, self.training)
        return _drop(hidden + self.weight[start : start + tokens], self.dropout, self.training)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, hidden: Tensor, past: Past | None = None) -> Tensor:
        """From hidden [B, T, D] to hidden [B, T, D]."""
        if hidden.device.type == "cpu":
            return rms_norm(hidden, self.weight, EPSILON)
        return F.rms_norm(hidden, self.weight.shape, self.weight, EPSILON)  # one kernel on GPUs


class LayerNorm(nn.LayerNorm):
    """Mean 0, variance 1 over the last dimension, then weight and bias."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, eps=EPSILON)

    def forward(self, hidden: Tensor, past: Past | None = None) -> Tensor:
        """From hidden [B, T, D] to hidden [B, T, D]."""
        return super().forward(hidden)


class Attention(nn.Module):
    """Causal attention with grouped queries: `group` query heads share one key/value head.

    `qkv` holds the rows of all query heads, then all key heads, then all value heads. `qk_norm` divides each
    query and key head by its RMS before the rotation, without a weight (arXiv 2010.04245).
    """

    def __init__(
        self,
        d_model: int,
        head_dim: int,
        group: int,
        *,
        bias: bool,
        dropout: float,
        qk_norm: bool,
        rotary: Rotary | None,
    ) -> None:
        super().__init__()
        heads = d_model // head_dim
        self.head_dim, self.group, self.dropout = head_dim, group, dropout
        self.qk_norm, self.rotary = qk_norm, rotary
        self.qkv = nn.Linear(d_model, (heads + 2 * (heads // group)) * head_dim, bias=bias)
        self.output = nn.Linear(heads * head_dim, d_model, bias=bias)

    def forward(self, hidden: Tensor, past: Past | None = None, bounds: Bounds | None = None) -> Tensor:
        """From hidden [B, T, D] to hidden [B, T, D]; with `bounds` within each document."""
        qkv = self.qkv(hidden).unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2K, h]
        start = 0 if past is None else past.seen
        tables = None if self.rotary is None else self.rotary.tables(start, qkv.shape[1], qkv.device)
        if self.rotary is not None and bounds is not None:
            tables = self.rotary.at(bounds.places)
        kv_heads = qkv.shape[2] // (self.group + 2)
        q, k, v = split_heads(qkv, kv_heads, tables, EPSILON if self.qk_norm else None)
        if past is not None:
            k, v = past.extend(k, v)
        mixed = self.attend(q, k, v, is_causal=start == 0, mask=None if bounds is None else bounds.mask)
        return _drop(self.output(mixed.flatten(2)), self.dropout, self.training)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True, mask: Tensor | BlockMask | None = None
    ) -> Tensor:
        """From q [B, T, H, h], k and v [B, S, K, h] to [B, T, H, h].

        S = T, or T = 1 for a token that follows others and sees them all: then `is_causal` is False. A `mask` says
        what is seen of the documents in a batch; see `Bounds`.
        """
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if isinstance(mask, BlockMask):
            return document_mask.attend(q, k, v, mask).transpose(1, 2)
        dropout, causal = self.dropout if self.training else 0.0, is_causal and mask is None
        grouped = self.group > 1
        if grouped and q.is_cuda and (mask is not None or q.dtype == torch.float32):
            # only flash attention knows groups there, and it takes neither: what is left would hold all scores
            k, v = (tensor.repeat_interleave(self.group, 1) for tensor in (k, v))
            grouped = False
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped)
        return mixed.transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers with an activation: gelu (tanh form, as GPT-2), swiglu (arXiv 2002.05202), relu2."""

    def __init__(self, d_model: int, d_ff: int, activation: str, *, bias: bool, dropout: float) -> None:
        super().__init__()
        self.activation, self.dropout = activation, dropout
        self.gate = nn.Linear(d_model, d_ff, bias=bias) if activation == "swiglu" else None
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """From hidden [B, T, D] to hidden [B, T, D]."""
        up = self.up(hidden)
        if self.gate is not None:
            up = F.silu(self.gate(hidden)) * up
        elif self.activation == "relu2":
            up = relu_squared(up)
        else:
            up = F.gelu(up, approximate="tanh")
        return _drop(self.down(up), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, attention_norm: nn.Module, attention: Attention, mlp_norm: nn.Module, mlp: MLP) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp
        self.recompute: Literal["no", "yes", "from host"] = "no"
        self.documents: Documents | None = None

    def forward(self, hidden: Tensor, past: Past | None = None) -> Tensor:
        """From hidden [B, T, D] to hidden [B, T, D].

        With `recompute` only the input is kept for the backward pass (in host memory if so said), and all between
        is computed again there (arXiv 1604.06174).
        """
        # handed on by value: the next batch may have been seen when this one is computed again
        bounds = None if self.documents is None or past is not None else self.documents.now
        if self.recompute == "no" or not torch.is_grad_enabled():
            return self._mix(hidden, past, bounds)
        with save_on_cpu(pin_memory=hidden.is_cuda) if self.recompute == "from host" else nullcontext():
            again: Tensor = checkpoint(self._mix, hidden, None, bounds, use_reentrant=False)
        return again

    def _mix(self, hidden: Tensor, past: Past | None, bounds: Bounds | None) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), past, bounds)
        mixed: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return mixed


class Head(nn.Module):
    """Projects hidden [B, T, D] to the vocabulary with an own matrix, or with that of the token embedding."""

    def __init__(self, vocab_size: int, d_model: int, softcap: float | None, tied: TokenEmbedding | None) -> None:
        super().__init__()
        self.softcap = softcap
        self.share: Share | None = None  # set where the rows are cut over ranks
        self._tied = None if tied is None else (tied,)  # in a tuple, lest the module be registered twice
        if tied is None:
            self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def matrix(self) -> Tensor:
        """The projection [vocab_size, D]."""
        return self.weight if self._tied is None else self._tied[0].weight

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab_size], of a share its own; with labels [B, T] the summed loss, without the logits."""
        if labels is None:
            return project(hidden, self.matrix(), self.softcap)
        return cross_entropy_sum(hidden, self.matrix(), labels, self.softcap, self.share)


def _drop(x: Tensor, probability: float, training: bool) -> Tensor:
    return F.dropout(x, probability) if training and probability > 0 else x
