"""The reference curve of every layout: one process, plain PyTorch, the global batch as a whole.

Only the model is megagpt's, which other tests compare with transformers. Loss, optimizer, clipping, schedule and
precision are implemented here independently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from megagpt.config.recipe import Recipe
from megagpt.config.recipe.sections import ScheduleSection
from megagpt.model.gpt import GPT, initialize
from megagpt.parity.curve import Curve
from tests.parity import alone
from tests.parity.muon_by_values import BLOCK_MATRICES, MuonByValues

Samples = tuple[torch.Tensor, torch.Tensor]  # input_ids and labels, each [global batch, seq]
Between = Callable[[int, Callable[[Samples], float]], None]


def train(
    recipe: Recipe,
    updates: Sequence[Samples],
    total: int,
    held_out: Samples,
    between: Between = lambda *_: None,
    *,
    micro: Sequence[int] = (),
    exact: bool = False,
) -> Curve:
    """Train on one global batch per update, with the recipe's schedule over `total` updates.

    In bf16 and fp16, the optimizer keeps fp32 master weights (initially the rounded values) and gets fp32 gradients.

    Args:
        recipe: The recipe.
        updates: The samples of each update.
        total: The length of the schedule, in updates.
        held_out: Samples to evaluate on before and after training.
        between: Called before each update with its number, counted from 1, and a function that measures the loss.
        micro: The number of samples per micro-batch, for each update. Gradients of micro-batches are summed in fp32.
            By default the global batch is not divided.
        exact: Compute in fp32 with the weights of low precision, to measure the error of rounding.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision]
    scale = 2.0**16 if recipe.precision == "fp16" and not exact else 1.0  # otherwise small gradients would underflow
    model = GPT(recipe.model)
    initialize(model, recipe.seed)
    model.to(dtype)
    masters = {name: p.detach().clone().float() for name, p in model.named_parameters()}
    if exact:
        model.float()
    initial = {name: p.clone() for name, p in masters.items()}
    section = recipe.optimizer
    optimizer, peaks = _optimizer(recipe, masters)
    losses, norms, rates, tokens, evaluations = [], [], [], [], [_loss(recipe, model, held_out).item()]
    for number, samples in enumerate(updates, start=1):
        between(number, lambda samples: _loss(recipe, model, samples).item())
        factor = _rate_factor(recipe.schedule, number, total, recipe.schedule.min_lr / section.lr)
        rates.append(section.lr * factor)
        tokens.append(int((samples[1] != -100).sum()))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        size = micro[number - 1] if micro else len(samples[0])
        total_loss = 0.0
        for part in zip(*(tensor.split(size) for tensor in samples), strict=True):
            model.zero_grad()
            loss = _loss(recipe, model, part, tokens[-1])
            (loss * scale).backward()
            for name, parameter in model.named_parameters():
                masters[name].grad += parameter.grad.float() / scale
            total_loss += loss.item()
        # in fp64: in fp32, a sum of squares over a long vector has an error of 1e-5
        norm = torch.cat([master.grad.flatten() for master in masters.values()]).double().norm()
        torch.nn.utils.clip_grads_with_norm_(masters.values(), section.clip or math.inf, norm.float())
        norms.append(norm.item())
        optimizer.step()
        for name, parameter in model.named_parameters():
            parameter.data.copy_(masters[name].to(dtype))
        losses.append(total_loss)
    evaluations.append(_loss(recipe, model, held_out).item())
    final = {name: p.detach() for name, p in masters.items()}
    return Curve(losses, norms, rates, tokens, evaluations, initial, final)


def _rate_factor(schedule: ScheduleSection, number: int, total: int, floor: float) -> float:
    """Return the learning rate of update `number` of `total`, as a fraction of the peak."""
    warmup, end = max(schedule.warmup_updates, 1), total + 1  # the rate would reach the floor one update after the last
    if number < warmup:
        return number / warmup
    if schedule.type == "warmup_cosine":
        height = (1 + math.cos(math.pi * (number - warmup) / (end - warmup))) / 2
    elif schedule.type == "wsd":
        height = min(1.0, (end - number) / (schedule.decay_updates + 1))
    else:
        height = (end - number) / (end - warmup)
    return floor + (1 - floor) * height


def _optimizer(recipe: Recipe, masters: dict[str, torch.Tensor]) -> tuple[torch.optim.Optimizer, list[float]]:
    """Return the optimizer, and the peak learning rate of each parameter group."""
    section = recipe.optimizer
    by_muon = {name for name in masters if section.type == "muon" and name.endswith(BLOCK_MATRICES)}
    rest = [p for name, p in masters.items() if name not in by_muon]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=section.betas, eps=section.eps, fused=False)
    if section.type == "adamw":
        return adamw, [section.lr] * 2
    heads = 2 + recipe.model.n_head // recipe.model.n_kv_head
    return MuonByValues(adamw, {name: masters[name] for name in by_muon}, heads, section), [
        section.lr, section.lr, section.muon_lr]  # fmt: skip


def _loss(recipe: Recipe, model: GPT, samples: Samples, tokens: int | None = None) -> torch.Tensor:
    """Return the loss summed over the valid tokens, divided by `tokens`, by default their number."""
    logits = alone.logits(model, samples[0], recipe.document_end)
    total = F.cross_entropy(logits.flatten(0, 1), samples[1].flatten(), ignore_index=-100, reduction="sum")
    return total / (tokens or (samples[1] != -100).sum())
