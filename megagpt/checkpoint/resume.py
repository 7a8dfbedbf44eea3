"""Find the checkpoint that a run resumes from, and refuse to resume with a different recipe or different data."""

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
# Keys of the recipe, or prefixes of keys, that may change within a run. None of them affects the results of the updates
# before the end of the run.
_FREE = ("run_dir", "init_from", "length.", "evaluation.", "checkpoint.", "health.compare_every", "log.")


def find_checkpoint(store: Store, mode: str) -> tuple[Checkpoint | None, list[str]]:
    """Find the checkpoint to resume from. Collective.

    Args:
        store: the run's checkpoints.
        mode: `auto` resumes from the newest valid checkpoint if there is one. `must` requires a valid checkpoint.
            `never` requires a run directory without checkpoints.

    Returns:
        The checkpoint (None to start a new run), and a line for each damaged checkpoint that was ignored.

    Raises:
        UserError: if the mode is unknown, if its requirement is not met, or if all checkpoints are damaged.
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
    """Return the checkpoint of another run from which a new run starts. Collective.

    Args:
        source: the other run and its update, as RUN@UPDATE or RUN@latest.
        where: location of `source` in the recipe, for error messages.
        store: the new run's checkpoints.
        total: length of the new run in updates.

    Raises:
        UserError: if the checkpoint does not exist, is damaged, or is not before the end of the new run.
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
    """Check that the recipe and the data are the same as those of the checkpoint.

    Args:
        checkpoint: the checkpoint to resume from.
        facts: the current recipe, data and layout, in the form in which checkpoints record them.
        allowed: keys or sections of the recipe that may differ. They need not differ, because the same command must
            still work when it is run again after the change.
        branched: whether the checkpoint belongs to another run, in which case the schedule may also differ.

    Raises:
        UserError: if the recipe or the data differ, with a list of all differences, or if a key in `allowed` does not
            exist.
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
    """Return a short checksum of JSON values, such as the values that describe the data and its order."""
    return f"{zlib.crc32(json.dumps(facts, sort_keys=True).encode()):08x}"


def layout_changes(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> str:
    """Return the differences between the current layout and the checkpoint's layout in one line, or "".

    Args:
        checkpoint: the checkpoint to resume from.
        facts: the current recipe, data and layout, in the form in which checkpoints record them.
    """
    return "; ".join(_differences(checkpoint.facts["layout"], facts["layout"]))


def recipe_changes(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> list[str]:
    """Return a line for each value of the recipe that differs from the checkpoint's, including allowed changes.

    Args:
        checkpoint: the checkpoint to resume from.
        facts: the current recipe, data and layout, in the form in which checkpoints record them.
    """
    return _differences(_flatten(checkpoint.facts["recipe"]), _flatten(facts["recipe"]))


def _is_within(line: str, key: str) -> bool:
    """Return whether a line, which begins with a dotted name, is about the given key or about a key in that section."""
    return line.split("  ")[0] == key or line.startswith(f"{key}.")


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = sorted({*then, *now})
    return [f"{key}  {then.get(key)} then, {now.get(key)} now" for key in keys if then.get(key) != now.get(key)]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings and lists to a single dictionary with dotted keys."""
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
