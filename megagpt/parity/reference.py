"""The run that a layout must repeat: one process, plain PyTorch, the global batch in one go."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megagpt.data.loader import IGNORED, Batch
from megagpt.engine import optimizer as optimizers
from megagpt.engine.schedule import factor
from megagpt.model.gpt import GPT, initialize
from megagpt.parity.curve import Curve
from megagpt.recipe import Recipe

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(recipe: Recipe, updates: Sequence[Batch], held_out: Batch) -> Curve:
    """Train on one global batch per update. Low precision: fp32 masters beside a model that is cast from them."""
    dtype, total = _DTYPES[recipe.precision or "fp32"], len(updates)
    scale = 2.0**16 if dtype == torch.float16 else 1.0  # lest small gradients vanish
    masters = GPT(recipe.model, recipe.document_end)
    initialize(masters, recipe.seed)
    masters.to(dtype).float()
    model = masters if dtype == torch.float32 else copy.deepcopy(masters).to(dtype)
    initial = {name: value.detach().clone() for name, value in masters.named_parameters()}
    optimizer = optimizers.build(recipe.optimizer, masters)
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses, norms, rates, tokens, evaluations = [], [], [], [], [_loss(model, held_out).item()]
    for number, batch in enumerate(updates, start=1):
        share = factor(recipe.schedule, number, total, recipe.schedule.min_lr / recipe.optimizer.lr)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        model.zero_grad()
        loss = _loss(model, batch)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        for master, parameter in zip(masters.parameters(), model.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float() / scale
        limit = recipe.optimizer.clip or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(masters.parameters(), limit).item())
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters.parameters(), model.parameters(), strict=True):
                parameter.copy_(master)
        losses.append(loss.item())
        rates.append(peaks[0] * share)
        tokens.append(int((batch.labels != IGNORED).sum()))
    evaluations.append(_loss(model, held_out).item())
    final = {name: value.detach() for name, value in masters.named_parameters()}
    return Curve(losses, norms, rates, tokens, evaluations, initial, final)


def _loss(model: GPT, batch: Batch) -> torch.Tensor:
    """The mean over the valid tokens of all samples."""
    logits = model(batch.input_ids).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
