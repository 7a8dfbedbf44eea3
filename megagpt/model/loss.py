"""Cross-entropy of a vocabulary projection, computed without holding all logits in memory.

The logits of a batch are by far its largest tensor. They take 4 bytes × tokens × vocabulary, and their gradient takes
the same. This module computes them for one chunk of tokens at a time. The gradient of a chunk (softmax minus one-hot)
is computed in the forward pass, so its logits need not be kept. The backward pass only scales the gradients.
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
        hidden: hidden states [..., d_model]
        weight: projection matrix [vocab_size, d_model]
        softcap: bound c of the logits, which are replaced by c·tanh(logits / c) (Gemma 2, arXiv 2408.00118). None for
            no bound

    Returns:
        The logits [..., vocab_size] in the dtype of the inputs.

    """
    logits = F.linear(hidden, weight)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None, shard: VocabShard | None = None
) -> Tensor:
    """Sum the cross-entropy over all labels that are not -100.

    Matrix products are computed in the dtype of the inputs, and everything else in fp32. The result can be
    differentiated with respect to `hidden` and `weight`.

    Args:
        hidden: hidden states [..., d_model]
        weight: projection matrix [vocab_size, d_model]
        labels: ids of the next tokens [...], int64
        softcap: bound of the logits, as in `project`
        shard: rows of the projection that this tensor-parallel rank holds as `weight`. All ranks must pass equal
            `hidden` and `labels`, and all get the same loss. None if this rank holds all rows

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
    """Return slices that split the tokens into as few chunks as possible, all of about the same length."""
    tokens = len(rows)
    count = max(1, -(-tokens // flops.chunk_tokens(len(weight), rows.device.type == "cpu")))
    edges = [tokens * i // count for i in range(count + 1)]
    return (slice(start, stop) for start, stop in pairwise(edges))


def _chunk_loss(
    rows: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, shard: VocabShard | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of a chunk of tokens, the log-probabilities in fp32, and the capped logits."""
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
    """Convert target ids to row indices of this rank's shard. Targets in other shards become IGNORE_INDEX."""
    if shard is None:
        return targets
    local = targets - shard.start
    return local.masked_fill((local < 0) | (local >= rows), IGNORE_INDEX)


def _logit_gradient(log_probabilities: Tensor, logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Return the gradient of the loss with respect to the uncapped logits. Overwrites `log_probabilities`.

    The values in rows with an ignored label are arbitrary. The caller masks these rows in the products [tokens,
    d_model], which are far smaller than the gradient.
    """
    gradient = log_probabilities.exp_()
    has_target = (targets >= 0).unsqueeze(-1)  # False if another rank holds the target's row
    gradient.scatter_add_(1, targets.clamp(min=0).unsqueeze(-1), -has_target.to(gradient.dtype))
    if softcap is not None:
        gradient *= 1 - (logits.float() / softcap).square()
    return gradient.to(logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies. The forward pass also computes the gradients, one chunk of tokens at a time."""

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
            # The gradient of the weight is summed in fp32, because bf16 would lose small contributions to the row of a
            # frequent token.
            if for_weight:
                product = (gradient.t() @ (rows[part] * valid)).float()
                d_weight = product if d_weight is None else d_weight.add_(product)
                del product
            # Free the memory of this chunk before the next one is computed.
            del log_probabilities, logits, gradient
        if shard is not None and d_rows is not None:
            d_rows = shard.sum(d_rows)
        ctx.save_for_backward(d_rows, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Return the stored gradients, scaled by the incoming one.

        The stored gradients are not modified, so that the backward pass can run again.
        """
        d_rows, d_weight = ctx.saved_tensors
        return (
            None if d_rows is None else d_rows * scale,
            None if d_weight is None else (d_weight * scale).to(ctx.weight_dtype),
            None,
            None,
            None,
        )
