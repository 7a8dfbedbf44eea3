"""Find the checkpoint that a run resumes from, and refuse to resume with another recipe or other data."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megagpt.checkpoint.store import Checkpoint, Store
from megagpt.errors import Problem, UserError

MODES = ("auto", "must", "never")
# keys that may change within a run: its length, what it shows and what it keeps. None of them changes the numbers of
# the updates before the end.
_FREE = ("run_dir", "init_from", "length.", "evaluation.", "checkpoint.", "health.compare_every", "log.")


def find_checkpoint(store: Store, mode: str) -> tuple[Checkpoint | None, list[str]]:
    """Find the checkpoint to resume from. Collective.

    Args:
        store: the run's checkpoints.
        mode: `auto` takes the newest valid checkpoint if there is one, `must` requires one, `never` requires an empty
            run directory.

    Returns:
        The checkpoint (None to start a new run), and a line for each damaged one that was ignored.

    Raises:
        UserError: The mode is unknown or its requirement is not met, or all checkpoints are damaged.
    """
    if mode not in MODES:
        raise UserError("there is no such way to resume", f"--resume {mode}", "write auto, must or never")
    run = store.run
    found, damaged = store.newest_valid()
    if mode == "never" and (found or damaged):
        raise UserError(
            "this run already has checkpoints, and --resume never would overwrite them",
            str(run / "checkpoints"),
            "choose another run_dir, remove this one, or resume with --resume auto",
        )
    if found is None and damaged:
        raise UserError(
            "this run has checkpoints, but all are damaged",
            "\n".join(damaged),
            "restore one from a copy, or remove the run directory to start over",
        )
    if found is None and mode == "must":
        raise UserError(
            "there is no checkpoint to resume from", str(run / "checkpoints"), "check run_dir, or use --resume auto"
        )
    return found, damaged


def find_branch_point(source: str, where: str, store: Store, total: int) -> Checkpoint:
    """Return the checkpoint of another run that a new run begins with. Collective.

    Args:
        source: RUN@UPDATE or RUN@latest.
        where: location of `source`, for error messages.
        store: the new run's checkpoints.
        total: length of the new run in updates.

    Raises:
        UserError: There is no such checkpoint, it is damaged, or it does not lie before the end of the new run.
    """
    name, _, update = source.rpartition("@")
    other = replace(store, run=Path(name))
    folders = other.folders()
    if other.run.resolve() == store.run.resolve():
        raise UserError("a run cannot begin with itself", where, "choose another run_dir for the branch")
    if not folders:
        raise UserError(
            f"there is no run with a checkpoint in {name}", where, "check the path of the run to begin with"
        )
    if update == "latest":
        found, damaged = other.newest_valid()
        problem = "\n".join(damaged)
    elif other.folder(int(update)) in folders:
        found, problem = other.valid(other.folder(int(update)).name)
    else:
        updates = ", ".join(str(int(folder.name.removeprefix("update_"))) for folder in folders)
        raise UserError(f"{name} has no checkpoint of update {update}", where, f"choose one of {updates}, or latest")
    if found is None:
        raise UserError("the checkpoint to begin with is damaged", f"{where}\n{problem}", "choose another update")
    if found.state.update >= total:
        what = f"the branch begins at update {found.state.update}, and the length is only {total} updates"
        raise UserError(what, where, "increase the length: updates count from the beginning of the other run")
    return found


def check_unchanged(
    checkpoint: Checkpoint, facts: Mapping[str, Any], allowed: Sequence[str] = (), branched: bool = False
) -> None:
    """Compare the recipe and data of this start with those of the checkpoint.

    Args:
        checkpoint: the checkpoint to resume from.
        facts: what this start would record in its checkpoints.
        allowed: keys or sections of the recipe that may differ. One that does not differ is no error, because the same
            command must still work after the change. One that does not exist is an error.
        branched: the checkpoint is another run's, so the schedule may differ, too.

    Raises:
        UserError: Lists all that differs.
    """
    free = (*_FREE, "schedule.") if branched else _FREE
    saved = checkpoint.facts
    old, new = _flatten(saved["recipe"]), _flatten(facts["recipe"])
    for key in allowed:
        if not any(_is_within(name, key) for name in (*old, *new)):
            raise UserError("the recipe has no such key", f"--allow-change {key}", "write KEY, SECTION.KEY or SECTION")
    problems = []
    refused = [
        line
        for line in _differences(old, new)
        if not line.startswith(free) and not any(_is_within(line, key) for key in allowed)
    ]
    if refused:
        what = f"the recipe is not the one that this run was trained with: {checkpoint.folder.name}"
        do = (
            f"train with {checkpoint.folder.parent.parent / 'recipe.yaml'}, choose another run_dir to start over, "
            "or allow each change by name: --allow-change KEY"
        )
        problems.append(Problem(what, "\n".join(refused), do))
    if data_changes := _differences(_flatten(saved["data"]), _flatten(facts["data"])):
        what = (
            f"the training data is not what this run was trained on: {checkpoint.folder.name} "
            f"(fingerprint {fingerprint(saved['data'])} then, {fingerprint(facts['data'])} now)"
        )
        do = "give the run its previous data, or choose another run_dir to start over"
        problems.append(Problem(what, "\n".join(data_changes), do))
    if problems:
        raise UserError.from_problems(problems)


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Return a short checksum of plain values, such as those that describe the data and its order."""
    return f"{zlib.crc32(json.dumps(facts, sort_keys=True).encode()):08x}"


def layout_changes(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> str:
    """Describe in one line how the layout differs from the checkpoint's; "" if it does not.

    Args:
        checkpoint: the checkpoint to resume from.
        facts: what this start would record in its checkpoints.
    """
    return "; ".join(_differences(checkpoint.facts["layout"], facts["layout"]))


def recipe_changes(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> list[str]:
    """Describe each recipe value that differs from the checkpoint's, including allowed changes.

    Args:
        checkpoint: the checkpoint to resume from.
        facts: what this start would record in its checkpoints.
    """
    return _differences(_flatten(checkpoint.facts["recipe"]), _flatten(facts["recipe"]))


def _is_within(line: str, key: str) -> bool:
    """Return whether a difference (or dotted name) is of this key, or of a key of this section."""
    return line.split("  ")[0] == key or line.startswith(f"{key}.")


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = sorted({*then, *now})
    return [f"{key}  {then.get(key)} then, {now.get(key)} now" for key in keys if then.get(key) != now.get(key)]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings and lists as one mapping with dotted keys."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
