"""Cross-entropy of a vocabulary projection, computed without holding all logits in fp32.

The logits of a batch are its largest tensor by far: 4 bytes × tokens × vocabulary, and as much again for
their gradient. Here they exist for one chunk of tokens at a time. The gradients are computed in the same
pass (softmax minus one-hot), so nothing of a chunk has to be kept; backward only scales them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagpt.model import flops
from megagpt.state import IGNORE_INDEX


class Share(Protocol):
    """One rank's rows of a vocabulary that is cut over ranks, in order; what the ranks must tell each other."""

    first: int
    """the token id of this rank's first row"""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in its place; no gradient flows."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """The largest of x over the ranks, in its place; no gradient flows."""
        ...

    def join(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks; its gradient is the gradient of each x."""
        ...


def project(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    """Logits [..., vocab_size] of hidden [..., d_model] and weight [vocab_size, d_model], in their dtype.

    `softcap` c bounds them smoothly to (-c, c): c·tanh(logits / c) (Gemma 2, arXiv 2408.00118).
    """
    logits = F.linear(hidden, weight)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None, share: Share | None = None
) -> Tensor:
    """Sum of the cross-entropy over all labels that are not -100: nats, fp32, scalar.

    hidden [..., d_model], weight [vocab_size, d_model], labels [...] int64. Gradients flow to `hidden` and
    `weight`. Matrix products run in the inputs' dtype, everything else in fp32. With a `share`, `weight` holds
    this rank's rows; all ranks bring the same `hidden` and `labels`, and get the same loss.
    """
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad):
        total: Tensor = _ChunkedCrossEntropy.apply(rows, weight, targets, softcap, share)  # type: ignore[no-untyped-call]
        return total
    total = rows.new_zeros((), dtype=torch.float32)
    for part in _chunks(rows, weight):
        total += _chunk_loss(rows[part], weight, targets[part], softcap, share)[0]
    return total


def _chunks(rows: Tensor, weight: Tensor) -> Iterator[slice]:
    """Cut the tokens into even chunks, as few as may be."""
    tokens = len(rows)
    count = max(1, -(-tokens // flops.chunk_tokens(len(weight), rows.device.type == "cpu")))
    edges = [tokens * i // count for i in range(count + 1)]
    return (slice(start, stop) for start, stop in pairwise(edges))


def _chunk_loss(
    rows: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, share: Share | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a chunk, its log-probabilities in fp32, and its capped logits."""
    logits = project(rows, weight, softcap)
    if share is None:
        log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        return (
            F.nll_loss(log_probabilities, targets, ignore_index=IGNORE_INDEX, reduction="sum"),
            log_probabilities,
            logits,
        )
    shifted = logits.float()
    shifted = shifted - share.max(shifted.amax(dim=-1, keepdim=True))
    log_probabilities = shifted - share.sum(shifted.exp().sum(dim=-1, keepdim=True)).log_()
    mine = _local(targets, len(weight), share)
    loss = F.nll_loss(log_probabilities, mine, ignore_index=IGNORE_INDEX, reduction="sum")
    return share.sum(loss), log_probabilities, logits


def _local(targets: Tensor, rows: int, share: Share | None) -> Tensor:
    """The targets as rows of this rank's share; ignored where another rank has the row."""
    if share is None:
        return targets
    mine = targets - share.first
    return mine.masked_fill((mine < 0) | (mine >= rows), IGNORE_INDEX)


def _logit_gradient(log_probabilities: Tensor, logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Gradient of the loss by the uncapped logits, in the storage of `log_probabilities`.

    Rows with an ignored label hold rubbish: the caller masks the far smaller [tokens, d_model] tensors.
    """
    gradient = log_probabilities.exp_()
    hit = (targets >= 0).unsqueeze(-1)  # not where another rank has the target's row
    gradient.scatter_add_(1, targets.clamp(min=0).unsqueeze(-1), -hit.to(gradient.dtype))
    if softcap is not None:
        gradient *= 1 - (logits.float() / softcap).square()
    return gradient.to(logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies whose gradients are made chunk by chunk in forward."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, share: Share | None
    ) -> Tensor:
        total = rows.new_zeros((), dtype=torch.float32)
        for_rows, for_weight = ctx.needs_input_grad[:2]
        d_rows = torch.empty_like(rows) if for_rows else None
        d_weight = None
        for part in _chunks(rows, weight):
            loss, log_probabilities, logits = _chunk_loss(rows[part], weight, targets[part], softcap, share)
            total += loss
            mine = _local(targets[part], len(weight), share)
            gradient = _logit_gradient(log_probabilities, logits, mine, softcap)
            valid = (targets[part] != IGNORE_INDEX).unsqueeze(-1)
            if d_rows is not None:
                d_rows[part] = (gradient @ weight).mul_(valid)
            if for_weight:  # summed in fp32: bf16 would round away small parts of a frequent word's row
                product = (gradient.t() @ (rows[part] * valid)).float()
                d_weight = product if d_weight is None else d_weight.add_(product)
                del product
            del log_probabilities, logits, gradient  # else the next chunk's would stand beside them
        if share is not None and d_rows is not None:
            d_rows = share.sum(d_rows)
        ctx.save_for_backward(d_rows, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Scale the stored gradients by the incoming one; they stay as they are for a second backward."""
        d_rows, d_weight = ctx.saved_tensors
        return (
            None if d_rows is None else d_rows * scale,
            None if d_weight is None else (d_weight * scale).to(ctx.weight_dtype),
            None,
            None,
            None,
        )
