"""Read, save and restore the dynamic loss scale of fp16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from megagpt.state import LossScale

# These attributes of DeepSpeed's loss scaler change during training. The config determines all others.
_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def dynamic_scaler(optimizer: Any) -> DynamicLossScaler | None:
    """Return the dynamic loss scaler of a DeepSpeed optimizer, or None if the optimizer has none."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return scaler if isinstance(scaler, DynamicLossScaler) else None


def current(optimizer: Any) -> LossScale | None:
    """Return the current loss scale, or None if it is not dynamic."""
    scaler = dynamic_scaler(optimizer)
    return None if scaler is None else LossScale(scaler.cur_scale, scaler.min_scale)


def state_dict(optimizer: Any) -> dict[str, float]:
    """Return the loss scale and the counters that determine its next change, or {} if the scale is not dynamic."""
    scaler = dynamic_scaler(optimizer)
    return {} if scaler is None else {name: getattr(scaler, name) for name in _STATE}


def load_state_dict(optimizer: Any, state: Mapping[str, float]) -> None:
    """Restore the values that `state_dict` returned.

    Does nothing unless the loss scale is dynamic now and was dynamic when it was saved. The two can differ, because a
    run may resume in another precision.
    """
    scaler = dynamic_scaler(optimizer)
    if scaler is not None and {*_STATE} <= {*state}:
        vars(scaler).update({name: state[name] for name in _STATE})
