"""Learning-rate schedules, right by construction: update n of warm-up W uses peak·n/W, and none runs at 0.

The factors are closed forms of the update's number. `warmup_decay` without a floor is DeepSpeed's own
WarmupDecayLR, built in the one way that gives the closed form; its constructor alone starts with two updates
at rate 0, and its cosine never reaches the peak (deepspeed/runtime/lr_schedules.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.runtime.lr_schedules import WarmupDecayLR

from megagpt.config.recipe.sections import ScheduleSection


def factor(schedule: ScheduleSection, update: int, total: int, floor: float) -> float:
    """The share of the peak that update `update` of `total` uses, counted from 1.

    `floor` is min_lr as a share of the peak. After `total` the rate stays where it ended.
    """
    warmup = max(schedule.warmup_updates, 1)  # without a warm-up, too, the first update is at the peak
    if update <= warmup:
        return update / warmup
    decay = total - warmup
    if schedule.type == "wsd":
        decay = min(schedule.decay_updates or decay, decay)
    # the last update still runs above the floor: 1/(decay + 1) of the way is left
    done = max(0, min(update, total) - (total - decay)) / (decay + 1)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule.type == "warmup_cosine" else 1 - done
    return floor + (1 - floor) * shape


def build(schedule: ScheduleSection, optimizer: torch.optim.Optimizer, total: int, peak: float) -> Any:
    """A scheduler with torch's interface over all parameter groups, each at its own peak rate."""
    floor = schedule.min_lr / peak
    if schedule.type == "warmup_decay" and floor == 0 and schedule.warmup_updates >= 2:
        return _warmup_decay_lr(schedule, optimizer, total)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: factor(schedule, done + 1, total, floor))


def done(scheduler: Any) -> int:
    """Updates that a scheduler of `build` has counted."""
    if isinstance(scheduler, WarmupDecayLR):
        return int(scheduler.last_batch_iteration) - 1
    return int(scheduler.last_epoch)


def go_to(scheduler: Any, updates: int) -> None:
    """Set a scheduler of `build` to where it stands after `updates` updates, with the rate of the next one."""
    if isinstance(scheduler, WarmupDecayLR):
        scheduler.step(updates + 1)
    else:
        scheduler.last_epoch = updates - 1
        scheduler.step()


def _warmup_decay_lr(schedule: ScheduleSection, optimizer: torch.optim.Optimizer, total: int) -> Any:
    """DeepSpeed's WarmupDecayLR (needs a warm-up of 2 or more: it takes 0 and 1 for 2)."""
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
    scheduler.step()  # its constructor leaves the rate of update 0; training begins with update 1
    return scheduler
