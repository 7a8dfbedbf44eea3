"""DeepSpeed's compiled operators that training may need, and the type of device that DeepSpeed runs on."""

from __future__ import annotations

from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.ops import op_builder

_BUILDERS = {"async_io": "AsyncIOBuilder", "fused_adam": "FusedAdamBuilder", "quantizer": "QuantizerBuilder"}


def load(name: str) -> Any:
    """Load the operator that DeepSpeed calls `name`, and compile it first if needed.

    Raises:
        Exception: whatever DeepSpeed's builder raises if the operator cannot be compiled.
    """
    return getattr(op_builder, _BUILDERS[name])().load(verbose=False)


def device() -> str:
    """Return the type of device that DeepSpeed has chosen: "cpu", "cuda" or another."""
    return str(get_accelerator().device_name())
