"""Access to DeepSpeed's compiled operators that training may need, and to the type of device that it runs on."""

from __future__ import annotations

from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.ops import op_builder

_BUILDERS = {"async_io": "AsyncIOBuilder", "fused_adam": "FusedAdamBuilder", "quantizer": "QuantizerBuilder"}


def load(name: str) -> Any:
    """Return the module of the DeepSpeed operator `name`, which is compiled first if necessary.

    Raises:
        Exception: If the operator cannot be compiled. DeepSpeed's builders raise exceptions of various types.
    """
    return getattr(op_builder, _BUILDERS[name])().load(verbose=False)


def device() -> str:
    """Return the type of device that DeepSpeed has chosen, such as "cpu" or "cuda"."""
    return str(get_accelerator().device_name())
