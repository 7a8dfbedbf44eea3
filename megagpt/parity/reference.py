"""Training in one process with plain PyTorch, as the reference that a layout must reproduce."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megagpt.config.recipe import Recipe
from megagpt.data.loader import Batch
from megagpt.engine.optim import build as optimizers
from megagpt.engine.optim.lr_schedule import factor
from megagpt.model.gpt import GPT, initialize
from megagpt.parity.curve import Curve
from megagpt.parity.shrink import MICRO
from megagpt.state import IGNORE_INDEX

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(recipe: Recipe, updates: Sequence[Batch], held_out: Batch, *, exact: bool = False) -> Curve:
    """Train on one global batch per update, and return the curve.

    In low precision, the model's weights are cast from fp32 master weights after each update. The batch is split into
    micro-batches whose gradients are accumulated in fp32, because sums over many tokens in low precision lose small
    terms.

    Args:
        recipe: The recipe.
        updates: The global batch of each update.
        held_out: Samples on which the model is evaluated before and after training.
        exact: Whether to compute in fp32, but with weights that are rounded to low precision. This is used to measure
            the error of low precision.

    Returns:
        The curve.
    """
    dtype, total = _DTYPES[recipe.precision or "fp32"], len(updates)
    arithmetic = torch.float32 if exact else dtype
    micro = MICRO if arithmetic != torch.float32 else None
    # Without a loss scale, small gradients would underflow in fp16.
    scale = 2.0**16 if arithmetic == torch.float16 else 1.0
    masters = GPT(recipe.model, recipe.document_end)
    initialize(masters, recipe.seed)
    masters.to(dtype).float()
    model = masters if dtype == torch.float32 else copy.deepcopy(masters).to(arithmetic)
    initial = {name: value.detach().clone() for name, value in masters.named_parameters()}
    optimizer = optimizers.build(recipe.optimizer, masters, on_gpu=False)
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses, norms, rates, tokens = [], [], [], []
    evaluations = [_loss(model, held_out, _valid(held_out)).item()]
    for number, batch in enumerate(updates, start=1):
        fraction = factor(recipe.schedule, number, total, recipe.schedule.min_lr / recipe.optimizer.lr)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * fraction
        losses.append(_gradients(masters, model, batch, micro or len(batch.labels), scale))
        # The norm is computed in fp64. In fp32, the rounding error of a long vector's norm would exceed the tolerance.
        gradients = [parameter.grad for parameter in masters.parameters() if parameter.grad is not None]
        norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm()
        torch.nn.utils.clip_grads_with_norm_(masters.parameters(), recipe.optimizer.clip or math.inf, norm.float())
        norms.append(norm.item())
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters.parameters(), model.parameters(), strict=True):
                parameter.copy_(master.to(dtype))
        rates.append(peaks[0] * fraction)
        tokens.append(_valid(batch))
    evaluations.append(_loss(model, held_out, _valid(held_out)).item())
    final = {name: value.detach() for name, value in masters.named_parameters()}
    return Curve(losses, norms, rates, tokens, evaluations, initial, final)


def _gradients(masters: GPT, model: GPT, batch: Batch, micro: int, scale: float) -> float:
    """Compute the gradients of the master weights, `micro` samples at a time, and return the loss."""
    total, valid = 0.0, _valid(batch)
    sums = [torch.zeros_like(master) for master in masters.parameters()]
    for part in zip(*(torch.split(tensor, micro) for tensor in batch), strict=True):
        model.zero_grad()
        loss = _loss(model, Batch(*part), valid)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        for one, parameter in zip(sums, model.parameters(), strict=True):
            assert parameter.grad is not None
            one += parameter.grad.float() / scale
        total += loss.item()
    for master, gradient in zip(masters.parameters(), sums, strict=True):
        master.grad = gradient
    return total


def _loss(model: GPT, batch: Batch, valid: int) -> torch.Tensor:
    """Return the loss summed over the valid tokens of these samples, divided by `valid`."""
    logits = model(batch.input_ids).logits.float()
    every = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return every / valid


def _valid(batch: Batch) -> int:
    return int((batch.labels != IGNORE_INDEX).sum())
