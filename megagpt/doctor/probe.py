"""What torch and DeepSpeed say of this host: devices, pinned memory and operators."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from megagpt.doctor.children import begin

PINNING, BUILDING = "pinning ", "building or loading "
"""what it says that it is at, before how much or which operator"""

_PINNED = 1 << 30  # bytes

Say = Callable[[dict[str, Any]], None]


def main() -> None:
    """Say each part as soon as it is known: what comes after it may hang."""
    words, say = begin()
    say({"doing": "import torch"})
    cuda = _torch(say)
    if cuda:
        say({"doing": f"{PINNING}{_PINNED >> 30} GiB of host memory"})
        say({"pinned": _pinned()})
    say({"doing": "import deepspeed"})
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from megagpt.engine import deepspeed_ops

    say({"accelerator": deepspeed_ops.device()})
    tried: dict[str, Any] = {}
    for name in [*words["operators"], *(words["gpu_operators"] if cuda else [])]:
        say({"doing": f"{BUILDING}{name}"})
        tried[name] = _operator(name)
        say({"operators": tried})


def _torch(say: Say) -> bool:
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call, unused-ignore]
        error = ""
    except (AssertionError, RuntimeError) as wrong:  # AssertionError: a build for CPUs
        error = str(wrong).splitlines()[0]
    count = 0 if error else torch.cuda.device_count()
    found = [torch.cuda.get_device_properties(number) for number in range(count)]
    say({"torch": {
        "version": torch.__version__, "cuda": torch.version.cuda, "error": error,
        "devices": [one.name for one in found], "memory": [one.total_memory for one in found],
    }})  # fmt: skip
    return count > 0


def _pinned() -> dict[str, Any]:
    import torch

    try:
        torch.empty(_PINNED, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        return {"bytes": _PINNED, "error": str(error).splitlines()[0]}
    return {"bytes": _PINNED, "error": ""}


def _operator(name: str) -> dict[str, Any]:
    """Seconds that an operator took, or why it does not load."""
    from megagpt.engine import deepspeed_ops

    begun = time.monotonic()
    try:
        deepspeed_ops.load(name)
    except Exception as error:  # a compiler, a header, a library, a lock: whatever it is, it is to be told
        return {"seconds": time.monotonic() - begun, "error": str(error).strip().splitlines()[0]}
    return {"seconds": time.monotonic() - begun, "error": ""}


if __name__ == "__main__":
    main()
