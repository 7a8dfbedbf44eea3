"""Check whether a rank fits into the memory of its device, and the ranks of a node into host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from megagpt.plan.machine import SAFE_FRACTION, Device

if TYPE_CHECKING:
    from megagpt.plan.memory import Memory

Verdict = Literal["fits", "too close to tell", "does not fit", "not checked"]
TOO_CLOSE: Final = "too close to tell"
DOES_NOT_FIT: Final = "does not fit"


@dataclass(frozen=True)
class Fit:
    """Memory that is needed and available, in bytes, on the device of the fullest rank and on its host."""

    device: Verdict
    device_name: str | None
    device_wanted: int
    device_memory: int | None
    host: Verdict
    host_wanted: int
    """host memory that all ranks of a node need together"""
    host_memory: int | None

    @property
    def is_good(self) -> bool:
        """True if everything that was checked fits with a margin."""
        return not {self.device, self.host} & {DOES_NOT_FIT, TOO_CLOSE}

    @property
    def is_bad(self) -> bool:
        """True if another layout should be tried."""
        return not self.is_good


def fit(memory: Memory, device: Device | None, ranks_per_node: int, host_memory: int | None) -> Fit:
    """Compare the memory that a run needs with the memory that is available.

    Args:
        memory: memory of the fullest rank.
        device: the device of each rank; None to skip the check.
        ranks_per_node: number of ranks that share a host.
        host_memory: available host memory per node in bytes; None to skip the check.

    Returns:
        The result of the comparison.
    """
    device_memory = None if device is None else device.memory
    host_wanted = ranks_per_node * memory.host
    return Fit(
        device=_verdict(memory.device, device_memory),
        device_name=None if device is None else device.name,
        device_wanted=memory.device,
        device_memory=device_memory,
        host=_verdict(host_wanted, host_memory),
        host_wanted=host_wanted,
        host_memory=host_memory,
    )


def _verdict(wanted: int, available: int | None) -> Verdict:
    if available is None:
        return "not checked"
    if wanted <= SAFE_FRACTION * available:
        return "fits"
    return TOO_CLOSE if wanted <= available else DOES_NOT_FIT
