"""Cross-entropy of a vocabulary projection, computed without holding all logits in memory.

The logits of a batch are by far its largest tensor: 4 bytes × tokens × vocabulary, and as much again for
their gradient. Here they exist for one chunk of tokens at a time. The gradients are computed in the same
pass (softmax minus one-hot), so nothing of a chunk has to be kept, and the backward pass only scales them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagpt.model import flops
from megagpt.model.parallel import VocabShard
from megagpt.state import IGNORE_INDEX


def project(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    """Project hidden states to logits.

    Args:
        hidden: [..., d_model]
        weight: [vocab_size, d_model]
        softcap: c, which bounds the logits smoothly to (-c, c): c·tanh(logits / c) (Gemma 2, arXiv 2408.00118)

    Returns:
        Logits [..., vocab_size] in the inputs' dtype.

    """
    logits = F.linear(hidden, weight)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None, shard: VocabShard | None = None
) -> Tensor:
    """Sum the cross-entropy over all labels that are not -100.

    Matrix products run in the inputs' dtype, everything else in fp32. Gradients flow to `hidden` and `weight`.

    Args:
        hidden: [..., d_model]
        weight: [vocab_size, d_model]
        labels: [...], int64
        softcap: see `project`
        shard: if given, `weight` holds the rows of this tensor-parallel rank, and all ranks pass equal `hidden` and
            `labels`, and receive the same loss

    Returns:
        The sum in nats, an fp32 scalar.

    """
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad):
        total: Tensor = _ChunkedCrossEntropy.apply(rows, weight, targets, softcap, shard)  # type: ignore[no-untyped-call]
        return total
    total = rows.new_zeros((), dtype=torch.float32)
    for part in _chunks(rows, weight):
        total += _chunk_loss(rows[part], weight, targets[part], softcap, shard)[0]
    return total


def _chunks(rows: Tensor, weight: Tensor) -> Iterator[slice]:
    """Split the tokens into the fewest chunks that are small enough, all of about the same length."""
    tokens = len(rows)
    count = max(1, -(-tokens // flops.chunk_tokens(len(weight), rows.device.type == "cpu")))
    edges = [tokens * i // count for i in range(count + 1)]
    return (slice(start, stop) for start, stop in pairwise(edges))


def _chunk_loss(
    rows: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, shard: VocabShard | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of a chunk, its log-probabilities in fp32, and its capped logits."""
    logits = project(rows, weight, softcap)
    if shard is None:
        log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        return (
            F.nll_loss(log_probabilities, targets, ignore_index=IGNORE_INDEX, reduction="sum"),
            log_probabilities,
            logits,
        )
    shifted = logits.float()
    shifted = shifted - shard.max(shifted.amax(dim=-1, keepdim=True))
    log_probabilities = shifted - shard.sum(shifted.exp().sum(dim=-1, keepdim=True)).log_()
    local_targets = _local_targets(targets, len(weight), shard)
    loss = F.nll_loss(log_probabilities, local_targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return shard.sum(loss), log_probabilities, logits


def _local_targets(targets: Tensor, rows: int, shard: VocabShard | None) -> Tensor:
    """Convert targets to rows of this rank's shard. Targets of other ranks are ignored."""
    if shard is None:
        return targets
    local = targets - shard.start
    return local.masked_fill((local < 0) | (local >= rows), IGNORE_INDEX)


def _logit_gradient(log_probabilities: Tensor, logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Return the gradient of the loss with respect to the uncapped logits; overwrites `log_probabilities`.

    Rows with an ignored label hold arbitrary values. The caller masks the far smaller [tokens, d_model] tensors.
    """
    gradient = log_probabilities.exp_()
    has_target = (targets >= 0).unsqueeze(-1)  # False if another rank has the target's row
    gradient.scatter_add_(1, targets.clamp(min=0).unsqueeze(-1), -has_target.to(gradient.dtype))
    if softcap is not None:
        gradient *= 1 - (logits.float() / softcap).square()
    return gradient.to(logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies, whose gradients are computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, shard: VocabShard | None
    ) -> Tensor:
        total = rows.new_zeros((), dtype=torch.float32)
        for_rows, for_weight = ctx.needs_input_grad[:2]
        d_rows = torch.empty_like(rows) if for_rows else None
        d_weight = None
        for part in _chunks(rows, weight):
            loss, log_probabilities, logits = _chunk_loss(rows[part], weight, targets[part], softcap, shard)
            total += loss
            local_targets = _local_targets(targets[part], len(weight), shard)
            gradient = _logit_gradient(log_probabilities, logits, local_targets, softcap)
            valid = (targets[part] != IGNORE_INDEX).unsqueeze(-1)
            if d_rows is not None:
                d_rows[part] = (gradient @ weight).mul_(valid)
            if (
                for_weight
            ):  # summed in fp32, because bf16 would round away small contributions to a frequent token's row
                product = (gradient.t() @ (rows[part] * valid)).float()
                d_weight = product if d_weight is None else d_weight.add_(product)
                del product
            del log_probabilities, logits, gradient  # before the next chunk allocates its own
        if shard is not None and d_rows is not None:
            d_rows = shard.sum(d_rows)
        ctx.save_for_backward(d_rows, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Scale the stored gradients by the incoming one. They are not modified, so that backward can run again."""
        d_rows, d_weight = ctx.saved_tensors
        return (
            None if d_rows is None else d_rows * scale,
            None if d_weight is None else (d_weight * scale).to(ctx.weight_dtype),
            None,
            None,
            None,
        )
