"""State that an update moves beside weights, moments and schedule: random numbers, and fp16's loss scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor

from megagpt.state import LossScale

_MOVING = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # the rest is the config's


class SideState:
    """The side state as it stands now, to go back to if the update that comes is not made."""

    def __init__(self, optimizer: Any) -> None:
        self._scaler = _scaler(optimizer)
        self._random, self._numbers = random_state(), loss_scale(optimizer)
        self.scale = None if self._scaler is None else LossScale(self._scaler.cur_scale, self._scaler.min_scale)

    def restore(self, with_scale: bool) -> None:
        """Go back; fp16's loss scale only if asked to, since an overflow is to lower it."""
        set_random_state(self._random)
        if self._scaler is not None and with_scale:
            vars(self._scaler).update(self._numbers)


def never_raise(optimizer: Any) -> None:
    """Let DeepSpeed pass over an overflow at the smallest loss scale, too: the run has better words for it."""
    if (scaler := _scaler(optimizer)) is not None:
        scaler.raise_error_at_min_scale = False


def loss_scale(optimizer: Any) -> dict[str, float]:
    """The numbers of fp16's dynamic loss scale; empty elsewhere."""
    scaler = _scaler(optimizer)
    return {} if scaler is None else {name: getattr(scaler, name) for name in _MOVING}


def set_loss_scale(optimizer: Any, numbers: Mapping[str, float]) -> None:
    """Restore what `loss_scale` gave, where there is such a scale on both sides."""
    scaler = _scaler(optimizer)
    if scaler is not None and numbers:  # the precision may have changed
        vars(scaler).update({name: numbers[name] for name in _MOVING})


def random_state() -> dict[str, Tensor]:
    """The random state of this rank: the host's, and the device's where there is one."""
    state = {"cpu": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        state["device"] = get_accelerator().get_rng_state().cpu()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Restore what `random_state` gave, on whatever device."""
    torch.set_rng_state(state["cpu"])
    if "device" in state and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(state["device"])


def _scaler(optimizer: Any) -> DynamicLossScaler | None:
    scaler = getattr(optimizer, "loss_scaler", None)
    return scaler if isinstance(scaler, DynamicLossScaler) else None
