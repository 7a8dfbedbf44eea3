"""Save and restore the RNG state and the fp16 loss scale, which change even if an update is skipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megagpt.engine.state import loss_scale


class RngAndLossScaleSnapshot:
    """RNG state and loss scale before an update, which are restored if the update is skipped."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._rng_state = rng_state()
        self._loss_scale_state = loss_scale.state_dict(optimizer)
        self.loss_scale = loss_scale.current(optimizer)

    def restore(self, with_loss_scale: bool) -> None:
        """Restore the RNG state, and also the loss scale if `with_loss_scale` is True.

        After an overflow, the loss scale must not be restored, because it has to decrease.
        """
        set_rng_state(self._rng_state)
        if with_loss_scale:
            loss_scale.load_state_dict(self._optimizer, self._loss_scale_state)


def rng_state() -> dict[str, Tensor]:
    """Return the RNG state of the CPU and, if this rank uses an accelerator, also that of the device."""
    state = {"cpu": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        state["device"] = get_accelerator().get_rng_state().cpu()
    return state


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Restore the state that `rng_state` returned. The RNG state of the device is ignored if this rank uses a CPU."""
    torch.set_rng_state(state["cpu"])
    if "device" in state and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(state["device"])
