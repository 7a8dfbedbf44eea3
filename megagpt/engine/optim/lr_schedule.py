"""Learning rate schedules as closed forms: update n of a warm-up of W uses peak·n/W, and no update uses a rate of 0.

`warmup_decay` without a floor is DeepSpeed's WarmupDecayLR, constructed such that it follows the closed form. Left to
itself, it uses a rate of 0 for the first two updates, and DeepSpeed's cosine schedule never reaches the peak
(deepspeed/runtime/lr_schedules.py; tests/unit/engine/test_deepspeed_faults.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.runtime.lr_schedules import WarmupDecayLR

from megagpt.config.recipe.sections import ScheduleSection


def factor(schedule: ScheduleSection, update: int, total: int, floor: float) -> float:
    """Return the learning rate of an update as a fraction of the peak.

    Args:
        schedule: The section of the recipe.
        update: The update, counted from 1. After `total` the rate stays constant.
        total: Number of updates of the whole run.
        floor: min_lr as a fraction of the peak.
    """
    warmup = max(schedule.warmup_updates, 1)  # without a warm-up, the first update uses the peak
    if update <= warmup:
        return update / warmup
    decay = total - warmup
    if schedule.type == "wsd":
        decay = min(schedule.decay_updates or decay, decay)
    # divided by decay + 1, so that the last update still runs above the floor
    progress = max(0, min(update, total) - (total - decay)) / (decay + 1)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.type == "warmup_cosine" else 1 - progress
    return floor + (1 - floor) * shape


def build(schedule: ScheduleSection, optimizer: torch.optim.Optimizer, total: int, peak: float) -> Any:
    """Build a scheduler with torch's interface, in which each parameter group has its own peak.

    Args:
        schedule: The section of the recipe.
        optimizer: The optimizer, whose groups contain their peak learning rates.
        total: Number of updates of the whole run.
        peak: The recipe's peak learning rate, of which min_lr is a fraction.
    """
    floor = schedule.min_lr / peak
    if schedule.type == "warmup_decay" and floor == 0 and schedule.warmup_updates >= 2:
        return _warmup_decay_lr(schedule, optimizer, total)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: factor(schedule, done + 1, total, floor))


def completed_updates(scheduler: Any) -> int:
    """Return the number of updates that a scheduler of `build` has counted."""
    if isinstance(scheduler, WarmupDecayLR):
        return int(scheduler.last_batch_iteration) - 1
    return int(scheduler.last_epoch)


def set_completed_updates(scheduler: Any, updates: int) -> None:
    """Set a scheduler of `build` to its state after `updates` updates, with the learning rate of the next one."""
    if isinstance(scheduler, WarmupDecayLR):
        scheduler.step(updates + 1)
    else:
        scheduler.last_epoch = updates - 1
        scheduler.step()


def _warmup_decay_lr(schedule: ScheduleSection, optimizer: torch.optim.Optimizer, total: int) -> Any:
    """Build DeepSpeed's WarmupDecayLR. It needs a warm-up of at least 2 updates: shorter ones count as 2."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    scheduler = WarmupDecayLR(
        optimizer,
        total_num_steps=total + 1,
        warmup_min_lr=[0.0] * len(peaks),
        warmup_max_lr=peaks,
        warmup_num_steps=schedule.warmup_updates,
        warmup_type="linear",
        last_batch_iteration=0,
    )
    scheduler.step()  # the constructor sets the rate of update 0, but training begins with update 1
    return scheduler
