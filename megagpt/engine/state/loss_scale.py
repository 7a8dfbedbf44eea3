"""fp16's dynamic loss scale: saved and restored, and changed when DeepSpeed has done with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from megagpt.state import LossScale

_MOVING = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # the rest is the config's


def ready(optimizer: Any) -> None:
    """Let the scale grow when the step is over, not before; and let an overflow at its minimum pass.

    DeepSpeed 0.19.8 doubles it first and then divides by it a gradient that was made with the old one
    (stage_1_and_2.py and stage3.py, step): every `loss_scale_window` updates, one uses half its gradient. What ends
    a run is the run's to say, and an update may be refused at the minimum, too.
    """
    scaler = _scaler(optimizer)
    if scaler is None:
        return
    scaler.raise_error_at_min_scale = False
    change, step = scaler.update_scale, optimizer.step

    def only_down(overflow: bool) -> None:
        if overflow:  # there is no step
            change(True)

    def step_then_up(*arguments: Any) -> Any:
        result = step(*arguments)
        if not optimizer.overflow:
            change(False)
        return result

    scaler.update_scale, optimizer.step = only_down, step_then_up


def of(optimizer: Any) -> LossScale | None:
    """The loss scale as it is; None where there is no dynamic one."""
    scaler = _scaler(optimizer)
    return None if scaler is None else LossScale(scaler.cur_scale, scaler.min_scale)


def numbers(optimizer: Any) -> dict[str, float]:
    """The loss scale and what decides on its next change; empty where there is no dynamic one."""
    scaler = _scaler(optimizer)
    return {} if scaler is None else {name: getattr(scaler, name) for name in _MOVING}


def set_numbers(optimizer: Any, values: Mapping[str, float]) -> None:
    """Restore what `numbers` gave, where there is a dynamic scale on both sides: the precision may have changed."""
    scaler = _scaler(optimizer)
    if scaler is not None and {*_MOVING} <= {*values}:
        vars(scaler).update({name: values[name] for name in _MOVING})


def _scaler(optimizer: Any) -> DynamicLossScaler | None:
    scaler = getattr(optimizer, "loss_scaler", None)
    return scaler if isinstance(scaler, DynamicLossScaler) else None
