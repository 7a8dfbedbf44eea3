"""DeepSpeed's compiled operators that training can need, by its own names for them, and the device it will run on."""

from __future__ import annotations

from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.ops import op_builder

_BUILDERS = {"async_io": "AsyncIOBuilder", "fused_adam": "FusedAdamBuilder", "quantizer": "QuantizerBuilder"}


def load(name: str) -> Any:
    """Load an operator, built first if it has not been. Raises whatever its builder does."""
    return getattr(op_builder, _BUILDERS[name])().load(verbose=False)


def device() -> str:
    """The kind of device that DeepSpeed has chosen: cpu, cuda or another."""
    return str(get_accelerator().device_name())
