"""Learning rate schedules in closed form.

Update n of a warm-up of W updates uses the learning rate peak·n/W. No update uses a learning rate of 0.

The schedule `warmup_decay` without a minimum learning rate uses DeepSpeed's WarmupDecayLR, with arguments that make it
follow the closed form. By default, WarmupDecayLR uses a learning rate of 0 for the first two updates.
DeepSpeed's cosine schedule is not used, because it never reaches the peak (deepspeed/runtime/lr_schedules.py;
tests/unit/engine/test_deepspeed_faults.py).
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
        schedule: The schedule section of the recipe.
        update: Number of the update, counted from 1. After update `total`, the learning rate stays constant.
        total: Number of updates of the whole run.
        floor: The minimum learning rate (`min_lr`) as a fraction of the peak.
    """
    warmup = max(schedule.warmup_updates, 1)  # without a warm-up, the first update uses the peak
    if update <= warmup:
        return update / warmup
    decay = total - warmup
    if schedule.type == "wsd":
        decay = min(schedule.decay_updates or decay, decay)
    # The divisor is decay + 1, so that the learning rate of the last update is still above the floor.
    progress = max(0, min(update, total) - (total - decay)) / (decay + 1)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.type == "warmup_cosine" else 1 - progress
    return floor + (1 - floor) * shape


def build(schedule: ScheduleSection, optimizer: torch.optim.Optimizer, total: int, peak: float) -> Any:
    """Build a learning rate scheduler with torch's interface. Each parameter group has its own peak learning rate.

    Args:
        schedule: The schedule section of the recipe.
        optimizer: The optimizer. The learning rate of each of its parameter groups is the peak of that group.
        total: Number of updates of the whole run.
        peak: The peak learning rate of the recipe. The ratio of `min_lr` to it applies to all groups.

    Returns:
        The scheduler.
    """
    floor = schedule.min_lr / peak
    if schedule.type == "warmup_decay" and floor == 0 and schedule.warmup_updates >= 2:
        return _warmup_decay_lr(schedule, optimizer, total)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: factor(schedule, done + 1, total, floor))


def completed_updates(scheduler: Any) -> int:
    """Return the number of updates that a scheduler, which must come from `build`, has counted."""
    if isinstance(scheduler, WarmupDecayLR):
        return int(scheduler.last_batch_iteration) - 1
    return int(scheduler.last_epoch)


def set_completed_updates(scheduler: Any, updates: int) -> None:
    """Set a scheduler to its state after `updates` updates, and set the learning rate of the next update.

    Args:
        scheduler: A scheduler that was built by `build`.
        updates: Number of completed updates.
    """
    if isinstance(scheduler, WarmupDecayLR):
        scheduler.step(updates + 1)
    else:
        scheduler.last_epoch = updates - 1
        scheduler.step()


def _warmup_decay_lr(schedule: ScheduleSection, optimizer: torch.optim.Optimizer, total: int) -> Any:
    """Build DeepSpeed's WarmupDecayLR, which treats a warm-up of less than 2 updates as one of 2 updates."""
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
    scheduler.step()  # the constructor sets the learning rate of update 0, but training begins with update 1
    return scheduler
