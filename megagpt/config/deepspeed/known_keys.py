"""The keys that DeepSpeed knows, recorded in a file for commands that must not import DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megagpt.files import parse_json

_FILE = Path(__file__).with_name("known_keys.json")


@lru_cache(maxsize=1)
def recorded_keys() -> Mapping[str, Any]:
    """Return the recorded result of `engine.deepspeed_keys.known_keys()`.

    `megagpt deepspeed-keys` prints an updated file.
    """
    keys: Mapping[str, Any] = parse_json(_FILE.read_text(encoding="utf-8"))["keys"]
    return keys


def version_note() -> str | None:
    """Return a note if the installed DeepSpeed is not the version that the keys were recorded for."""
    recorded = parse_json(_FILE.read_text(encoding="utf-8"))["deepspeed"]
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        return None
    if installed == recorded:
        return None
    return (
        f"keys and memory are those of DeepSpeed {recorded}, but {installed} is installed; "
        "training uses the keys of the installed version"
    )
