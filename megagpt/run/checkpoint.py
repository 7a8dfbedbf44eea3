"""Checkpoints are published, not written: a folder exists whole under its name, or not at all.

Ranks write into a partial folder; when all are done rank 0 writes sizes and checksums into a manifest, flushes
everything to the disk, renames the folder, and points `latest` at it. `latest` is a hint: the manifest decides.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megagpt.state import TrainState

MANIFEST = "manifest.json"
_PARTIAL = ".partial_"


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint: its folder, where the run stood, and the rest of its manifest."""

    folder: Path
    state: TrainState
    facts: dict[str, Any]


def publish(
    run: Path,
    state: TrainState,
    write: Callable[[Path], None],
    *,
    facts: dict[str, Any],
    keep_last: int | None,
    main: bool,
    barrier: Callable[[], None],
) -> Path:
    """Save through `write` (called on every rank with the partial folder) and publish; the final folder.

    `facts` go into the manifest as they are. Older checkpoints beyond `keep_last` (None: none) are removed after.
    """
    root = run / "checkpoints"
    final = root / f"update_{state.update:08d}"
    partial = root / (_PARTIAL + final.name)
    if main:
        for leftover in root.glob(_PARTIAL + "*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    barrier()
    write(partial)
    barrier()
    if main:
        _write_manifest(partial, state, facts)
        if final.exists():  # a damaged one of the same update, which resume passed over
            shutil.rmtree(final)
        partial.rename(final)
        _sync(root)
        replace_text(root / "latest", final.name + "\n")
        _remove_old(root, keep_last)
    barrier()
    return final


def newest_valid(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are all there and whole, and a line for each newer one that is not."""
    skipped: list[str] = []
    for folder in sorted((run / "checkpoints").glob("update_*"), reverse=True):
        checkpoint, wrong = _check(folder)
        if checkpoint is not None:
            return checkpoint, skipped
        skipped.append(f"{folder.name}: {wrong}")
    return None, skipped


def replace_text(path: Path, text: str) -> None:
    """Replace the file by `text` in one step: a reader sees the old one or the new one."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _check(folder: Path) -> tuple[Checkpoint | None, str]:
    """Read one checkpoint's manifest and hold every byte against it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        state = TrainState(**manifest.pop("state"))
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{MANIFEST} cannot be read ({error})"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return None, f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return None, f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
        if _crc32(path) != expected["crc32"]:
            return None, f"{name} is damaged: its checksum differs"
    return Checkpoint(folder, state, manifest), ""


def _write_manifest(folder: Path, state: TrainState, facts: dict[str, Any]) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _sync(path)
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
    manifest = {"state": asdict(state), **facts, "files": files}
    replace_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync(path: Path) -> None:
    """Flush a file's or folder's bytes from the cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_old(root: Path, keep_last: int | None) -> None:
    folders = sorted(root.glob("update_*"))
    for folder in folders[:-keep_last] if keep_last is not None else []:
        shutil.rmtree(folder)
