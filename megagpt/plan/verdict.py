"""Whether a rank fits its device, and its ranks their node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megagpt.plan.machine import SAFE, Device

if TYPE_CHECKING:
    from megagpt.plan.memory import Memory

Verdict = Literal["fits", "too near to say", "does not fit", "not asked"]


@dataclass(frozen=True)
class Fit:
    """Bytes wanted and there, on the device of the fullest rank and on its host."""

    device: Verdict
    device_name: str | None
    device_wanted: int
    device_memory: int | None
    host: Verdict
    host_wanted: int
    """of all ranks of a node"""
    host_memory: int | None

    @property
    def good(self) -> bool:
        """Whether there is room for surprises, wherever that was asked."""
        return not {self.device, self.host} & {"does not fit", "too near to say"}

    @property
    def bad(self) -> bool:
        """Whether something else had better be tried."""
        return not self.good


def fit(memory: Memory, device: Device | None, ranks: int, host_memory: int | None) -> Fit:
    """The verdict on `ranks` such ranks on each node."""
    room = None if device is None else device.memory
    name = None if device is None else device.name
    there = ranks * memory.host
    return Fit(
        _verdict(memory.device, room), name, memory.device, room, _verdict(there, host_memory), there, host_memory
    )  # fmt: skip


def _verdict(wanted: int, room: int | None) -> Verdict:
    if room is None:
        return "not asked"
    return "fits" if wanted <= SAFE * room else "too near to say" if wanted <= room else "does not fit"
