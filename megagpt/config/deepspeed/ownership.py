"""Keys of the DeepSpeed config whose values the recipe owns.

An "auto" is replaced by the recipe's value. Any other value that differs from the recipe's is a conflict.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megagpt.config.deepspeed.view import ConfigView
from megagpt.config.recipe import Recipe
from megagpt.config.recipe.optimizers import OPTIMIZERS
from megagpt.config.syntax.formatting import TableRow, format_table, format_value
from megagpt.errors import Problem, closest_match


@dataclass(frozen=True)
class OwnedKey:
    """One key of the DeepSpeed config whose value follows from the recipe."""

    key: str
    """dotted key of the DeepSpeed config"""
    owner: str
    """dotted key of the recipe"""
    name: str
    """description of the value for error messages"""
    value: Any
    """the value that follows from the recipe; None if DeepSpeed has no equivalent and only "auto" is allowed"""


_SCHEDULERS = {"warmup_decay": "WarmupDecayLR", "warmup_cosine": "WarmupCosineLR", "wsd": None}


def owned_keys(recipe: Recipe) -> tuple[OwnedKey, ...]:
    """Return all owned keys except those of the precision, which has its own rules (precision.py)."""
    optimizer, schedule = recipe.optimizer, recipe.schedule
    length = next(name for name, value in recipe.length if value is not None)
    params = "optimizer.params"
    timing = "scheduler.params"
    common = (
        OwnedKey("train_batch_size", "batch.global_size", "the global batch", recipe.batch.global_size),
        OwnedKey("gradient_clipping", "optimizer.clip", "the clipping norm", optimizer.clip or 0.0),
        OwnedKey("optimizer.type", "optimizer.type", "the optimizer", OPTIMIZERS[optimizer.type].deepspeed_type),
        OwnedKey(f"{params}.lr", "optimizer.lr", "the learning rate", optimizer.lr),
        OwnedKey(f"{params}.betas", "optimizer.betas", "the betas", list(optimizer.betas)),
        OwnedKey(f"{params}.eps", "optimizer.eps", "eps", optimizer.eps),
        OwnedKey(f"{params}.weight_decay", "optimizer.weight_decay", "the weight decay", optimizer.weight_decay),
        OwnedKey("scheduler.type", "schedule.type", "the schedule", _SCHEDULERS[schedule.type]),
        OwnedKey(f"{timing}.warmup_max_lr", "optimizer.lr", "the learning rate", optimizer.lr),
        OwnedKey(f"{timing}.warmup_min_lr", "schedule.warmup_updates", "the start of the warm-up", 0),
        OwnedKey(f"{timing}.warmup_min_ratio", "schedule.warmup_updates", "the start of the warm-up", 0),
        OwnedKey(f"{timing}.warmup_type", "schedule.warmup_updates", "the form of the warm-up", "linear"),
        OwnedKey(f"{timing}.warmup_num_steps", "schedule.warmup_updates", "the warm-up", schedule.warmup_updates),
        OwnedKey(f"{timing}.total_num_steps", f"length.{length}", "the length of training", recipe.length.updates),
        OwnedKey(
            f"{timing}.cos_min_ratio", "schedule.min_lr", "the final learning rate", schedule.min_lr / optimizer.lr
        ),
    )
    own = (
        OwnedKey(
            f"{params}.{parameter.name}",
            f"optimizer.{parameter.recipe_key}",
            parameter.description,
            getattr(optimizer, parameter.recipe_key),
        )
        for parameter in OPTIMIZERS[optimizer.type].deepspeed_parameters
    )
    return (*common, *own)


def ownership_conflicts(view: ConfigView, recipe: Recipe, values: Sequence[OwnedKey]) -> Iterator[Problem]:
    """Yield a problem for each owned key that the DeepSpeed config sets to another value.

    Args:
        view: the DeepSpeed config.
        recipe: the recipe.
        values: the owned keys with the recipe's values.
    """
    for value in values:
        stated = view.get(value.key, "auto")
        if stated != "auto" and not _same(stated, value.value):
            yield ownership_conflict(value, view, recipe)


def ownership_conflict(value: OwnedKey, view: ConfigView, recipe: Recipe) -> Problem:
    """Return the problem of a value that is set both in the recipe and in the DeepSpeed config.

    Args:
        value: the owned key.
        view: the DeepSpeed config.
        recipe: the recipe.
    """
    location = view.tree.locations[value.key].at
    rows: list[TableRow] = [
        (value.owner, _in_recipe(recipe, value.owner), recipe.location(value.owner) or "default"),
        view.row(value.key),
    ]
    file = location.rpartition(":")[0]  # This is "" for the command line.
    do = f'write "auto" in {file} (the recipe owns it)' if file else f"use {value.owner}=VALUE (the recipe owns it)"
    kept = _kept_in_recipe(value, view, recipe)
    if kept and not recipe.location(value.owner):
        do = f'write "auto" in {file} to use the default, or set {value.owner} to {kept} in the recipe'
        if not file:
            do = f"use {value.owner}={kept}"
        return Problem(f"the recipe owns {value.name}, and its default is another", format_table(rows), do)
    return Problem(f"two places set {value.name}", format_table(rows), do)


def _kept_in_recipe(value: OwnedKey, view: ConfigView, recipe: Recipe) -> str:
    """Return the config's value as it would be written in the recipe, or "" if the recipe uses another unit or type."""
    stated, own = view.get(value.key), _in_recipe(recipe, value.owner)
    numbers = stated if isinstance(stated, list) else [stated]
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
        return ""
    if value.value != (list(own) if isinstance(own, tuple) else own):
        return ""  # The config uses another unit, such as a ratio.
    is_off = value.key == "gradient_clipping" and stated == 0
    return "null" if is_off else format_value(stated)


def ignored_parameters(view: ConfigView, values: Sequence[OwnedKey]) -> Iterator[Problem]:
    """Yield a problem for each parameter of the optimizer or scheduler section that would have no effect.

    Args:
        view: the DeepSpeed config.
        values: the owned keys.
    """
    for section in ("optimizer", "scheduler"):
        prefix = f"{section}.params."
        known = {value.key.removeprefix(prefix) for value in values if value.key.startswith(prefix)}
        params = view.get(f"{section}.params", {})
        for name in params if isinstance(params, dict) else ():
            if name not in known:
                near = closest_match(name, known)
                what = f"{prefix}{name} would be ignored: megagpt builds the {section} itself"
                yield view.problem(what, [prefix + name], f"write {near}" if near else "remove it")
    if view.is_given("optimizer.legacy_fusion"):
        what = "optimizer.legacy_fusion would be ignored: megagpt builds the optimizer itself"
        yield view.problem(what, ["optimizer.legacy_fusion"], "remove it")


def _same(stated: Any, value: Any) -> bool:
    if isinstance(stated, str) and isinstance(value, str):
        return stated.lower() == value.lower()
    if isinstance(stated, bool) or isinstance(value, bool):
        return stated is value
    return bool(stated == value)


def _in_recipe(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value
