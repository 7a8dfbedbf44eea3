"""From which checkpoint a run goes on, and whether it may: never a silent restart, never another recipe unseen."""

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
# what may change in a run: how long it is, what it shows and keeps; nothing that moves the numbers before the end
_FREE = ("run_dir", "init_from", "length.", "evaluation.", "checkpoint.", "health.compare_every", "log.")


def find(store: Store, mode: str) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from (None: start anew), and a line for each damaged one that was passed over.

    `auto` takes the newest valid one if there is any, `must` insists on one, `never` insists on an empty run.
    """
    if mode not in MODES:
        raise UserError("there is no such way to resume", f"--resume {mode}", "write auto, must or never")
    run = store.run
    found, skipped = store.newest_valid()
    damaged = "\n".join(skipped)
    if mode == "never" and (found or skipped):
        raise UserError(
            "this run has checkpoints already, and --resume never would train over them",
            str(run / "checkpoints"),
            "choose another run_dir, remove this one, or go on with --resume auto",
        )
    if found is None and skipped:
        raise UserError(
            "this run has checkpoints, but none is whole",
            damaged,
            "restore one from a copy, or remove the run directory to start anew",
        )
    if found is None and mode == "must":
        raise UserError(
            "there is no checkpoint to resume from", str(run / "checkpoints"), "check run_dir, or use --resume auto"
        )
    return found, skipped


def branch(source: str, where: str, store: Store, total: int) -> Checkpoint:
    """The checkpoint of another run that a new one of `total` updates begins with: RUN@UPDATE or RUN@latest.

    `where` is the place of that word. Raises UserError where there is none, or where it is not whole.
    """
    name, _, at = source.rpartition("@")
    other = replace(store, run=Path(name))
    there = other.folders()
    if other.run.resolve() == store.run.resolve():
        raise UserError("a run cannot begin with itself", where, "choose another run_dir for the branch")
    if not there:
        raise UserError(
            f"there is no run with a checkpoint in {name}", where, "check the path of the run to begin with"
        )
    if at == "latest":
        found, passed_over = other.newest_valid()
        wrong = "\n".join(passed_over)
    elif other.folder(int(at)) in there:
        found, wrong = other.valid(other.folder(int(at)).name)
    else:
        updates = ", ".join(str(int(folder.name.removeprefix("update_"))) for folder in there)
        raise UserError(f"{name} has no checkpoint of update {at}", where, f"choose one of {updates}, or latest")
    if found is None:
        raise UserError("the checkpoint to begin with is damaged", f"{where}\n{wrong}", "choose another update")
    if found.state.update >= total:
        what = f"the branch begins at update {found.state.update}, and the length is only {total} updates"
        raise UserError(what, where, "give a longer length: updates count from the beginning of the other run")
    return found


def check(
    checkpoint: Checkpoint, facts: Mapping[str, Any], allowed: Sequence[str] = (), branched: bool = False
) -> None:
    """Compare this start's recipe and data with the checkpoint's. Raises UserError listing all that differs.

    `allowed` are keys of the recipe, or its sections, that may have changed. The same command must go on when it is
    typed again after the change, so one that is as it was is no mistake; one that there is not, is.
    The schedule of a run that has `branched` off is its own.
    """
    free = (*_FREE, "schedule.") if branched else _FREE
    then = checkpoint.facts
    old, new = _flat(then["recipe"]), _flat(facts["recipe"])
    recipe = _differences(old, new)
    for key in allowed:
        if not any(_within(name, key) for name in (*old, *new)):
            raise UserError("the recipe has no such key", f"--allow-change {key}", "write KEY, SECTION.KEY or SECTION")
    changed = [line for line in recipe if not line.startswith(free) and not any(_within(line, key) for key in allowed)]
    do = (
        f"train with {checkpoint.folder.parent.parent / 'recipe.yaml'}, choose another run_dir to start anew, "
        "or allow each change by name: --allow-change KEY"
    )
    what = f"the recipe is not the one that this run was trained with: {checkpoint.folder.name}"
    problems = [Problem(what, "\n".join(changed), do)] if changed else []
    if changed := _differences(_flat(then["data"]), _flat(facts["data"])):
        what = (
            f"the training data is not what this run was trained on: {checkpoint.folder.name} "
            f"(fingerprint {fingerprint(then['data'])} then, {fingerprint(facts['data'])} now)"
        )
        do = "give the run its old data, or choose another run_dir to start anew"
        problems.append(Problem(what, "\n".join(changed), do))
    if problems:
        raise UserError.from_problems(problems)


def fingerprint(facts: Mapping[str, Any]) -> str:
    """A short name for plain facts, such as those of some data and its order."""
    return f"{zlib.crc32(json.dumps(facts, sort_keys=True).encode()):08x}"


def moved(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> str:
    """What of the layout is not as it was, in one line; "" where nothing has changed."""
    return "; ".join(_differences(checkpoint.facts["layout"], facts["layout"]))


def changes(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> list[str]:
    """A line for each value of the recipe that is not as it was, free or allowed."""
    return _differences(_flat(checkpoint.facts["recipe"]), _flat(facts["recipe"]))


def _within(line: str, key: str) -> bool:
    """Whether a line of difference is about this key, or about one of the section."""
    return line.split("  ")[0] == key or line.startswith(f"{key}.")


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = sorted({*then, *now})
    return [f"{key}  {then.get(key)} then, {now.get(key)} now" for key in keys if then.get(key) != now.get(key)]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
