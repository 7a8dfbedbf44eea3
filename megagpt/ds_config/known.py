"""DeepSpeed's keys as they were written down, for commands that must not wait for it to be imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("known_keys.json")


@lru_cache(maxsize=1)
def recorded_keys() -> Mapping[str, Any]:
    """What engine.keys.known_keys() gave, of the DeepSpeed version that `written_for` names."""
    keys: Mapping[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))["keys"]
    return keys


def version_note() -> str | None:
    """A note where another DeepSpeed is installed than the keys were written down for."""
    written = json.loads(_FILE.read_text(encoding="utf-8"))["deepspeed"]
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        return None
    if installed == written:
        return None
    return f"keys and memory are those of DeepSpeed {written}; {installed} is installed, and training asks it"
