"""What torch and DeepSpeed say of this host: devices, pinned memory, operators, and whether the files fit together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
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
    from megagpt.engine import operators

    say({"accelerator": operators.device()})
    if words["resolve"]:
        say({"doing": "reading the recipe and the DeepSpeed config"})
        say({"mistakes": _mistakes(words["resolve"])})
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
    devices = [torch.cuda.get_device_name(number) for number in range(count)]
    say({"torch": {"version": torch.__version__, "cuda": torch.version.cuda, "devices": devices, "error": error}})
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
    from megagpt.engine import operators

    begun = time.monotonic()
    try:
        operators.load(name)
    except Exception as error:  # a compiler, a header, a library, a lock: whatever it is, it is to be told
        return {"seconds": time.monotonic() - begun, "error": str(error).strip().splitlines()[0]}
    return {"seconds": time.monotonic() - begun, "error": ""}


def _mistakes(asked: Mapping[str, Any]) -> list[dict[str, str]]:
    """What is wrong with the recipe and the config together, on so many ranks, as `megagpt train` would say it."""
    from megagpt import ds_config, recipe
    from megagpt.engine import keys
    from megagpt.errors import UserError

    try:
        loaded = recipe.load(asked["recipe"], asked["overrides"])
        ds_config.load(asked["config"], loaded, asked["world"], keys.known_keys(), asked["overrides"])
    except UserError as error:
        return [{"what": problem.what, "where": problem.where, "do": problem.do} for problem in error.problems]
    return []


if __name__ == "__main__":
    main()
