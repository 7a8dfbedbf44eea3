"""State that an update moves beside weights, moments and schedule: random numbers, and fp16's loss scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megagpt.engine.state import loss_scale


class SideState:
    """The side state as it stands now, to go back to if the update that comes is not made."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self._random = optimizer, random_state()
        self._numbers, self.scale = loss_scale.numbers(optimizer), loss_scale.of(optimizer)

    def restore(self, with_scale: bool) -> None:
        """Go back; fp16's loss scale only if asked to, since an overflow is to lower it."""
        set_random_state(self._random)
        if with_scale:
            loss_scale.set_numbers(self._optimizer, self._numbers)


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
