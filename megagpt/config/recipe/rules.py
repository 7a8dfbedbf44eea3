"""Rules between the keys of a recipe, as functions that return (what is wrong, what to do), or None if the rule holds.

A rule is checked only if every value that it needs is well formed, so that no mistake is reported twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from megagpt.config.recipe.optimizers import OPTIMIZERS, OptimizerKey
from megagpt.config.recipe.presets import PRESETS
from megagpt.config.recipe.synonyms import preset_of_synonym
from megagpt.config.syntax.formatting import join_words
from megagpt.errors import closest_match

Violation = tuple[str, str] | None
Rule = tuple[Callable[..., Violation], tuple[str, ...]]
"""A function, and the keys whose values are its arguments."""


def _preset(preset: str | None) -> Violation:
    if preset is None or preset in PRESETS:
        return None
    what = f'there is no preset "{preset}"'
    near = preset_of_synonym(preset) or closest_match(preset, PRESETS)
    if near:
        return what, f"write {near}"
    family = [name for name in PRESETS if name.startswith(f"{preset.lower()}-")]
    return what, f"choose one of {', '.join(family or PRESETS)}"


def _init_from(init_from: str | None) -> Violation:
    if init_from is None or re.fullmatch(r".+@(latest|[0-9]+)", init_from):
        return None
    return (
        f'init_from: "{init_from}" does not name an update of a run',
        "write RUN_DIRECTORY@UPDATE, or RUN_DIRECTORY@latest",
    )


def _head_dimension(d_model: int, n_head: int) -> Violation:
    if d_model % n_head == 0:
        return None
    below = d_model // n_head * n_head
    near = join_words(str(width) for width in (below, below + n_head) if width)
    return "model.d_model is not a multiple of model.n_head", f"set model.d_model to {near}"


def _query_groups(n_head: int, n_kv_head: int) -> Violation:
    if n_head % n_kv_head == 0:
        return None
    divisors = join_words(str(count) for count in range(1, n_head + 1) if n_head % count == 0)
    return "model.n_head is not a multiple of model.n_kv_head", f"set model.n_kv_head to {divisors}"


def _rotary_head_dimension(d_model: int, n_head: int, position: str) -> Violation:
    if position != "rope" or d_model % n_head or (d_model // n_head) % 2 == 0:
        return None
    what = f"position: rope rotates pairs of elements, but the head dimension {d_model // n_head} is odd"
    return what, f"set model.d_model to a multiple of {2 * n_head}"


def _sources(train: Any, validation: Any) -> Violation:
    sources = train if isinstance(train, list) else [train]
    paths = [source["path"] if isinstance(source, dict) else source for source in sources]
    if not paths:
        return "data.train is an empty list", "give at least one prefix"
    held_out = [validation] if isinstance(validation, str) else validation or []
    for path in [*paths, *held_out]:
        if path.endswith((".bin", ".idx")):
            return f'"{path}" is a file, not a prefix', f"write {path[:-4]}"
    if set(held_out) & set(paths):
        return "data.validation is also in data.train", "give it a prefix of its own"
    return None


def _eod(mask: bool, eod: int | None, vocab_size: int) -> Violation:
    if eod is not None and not mask:
        return "data.eod is used by data.document_mask only", "remove it, or set data.document_mask to true"
    if eod is not None and eod >= vocab_size:
        return "data.eod is not a token id of the vocabulary", f"give a number below {vocab_size}"
    return None


def _skip(skip: Any) -> Violation:
    backwards = [pair for pair in skip if pair[1] < pair[0]]
    if not backwards:
        return None
    return f"data.skip has a range that ends before it begins: {backwards[0]}", "write [first, last]"


def _validation(every: int | None, validation: Any) -> Violation:
    if every is None or validation:
        return None
    return "evaluation.every needs data.validation", "give data.validation, or set evaluation.every to null"


def _prompt(prompt: str | None, every: int | None, tokenizer: str | None) -> Violation:
    if prompt is None or (every is not None and tokenizer is not None):
        return None
    missing = "evaluation.every" if every is None else "data.tokenizer"
    return f"evaluation.prompt needs {missing}", f"give {missing}, or set evaluation.prompt to null"


def _only_for(optimizer: str, key: OptimizerKey) -> Rule:
    """Return the rule that a key is given only with the optimizer it belongs to, and always if it has no default."""

    def check(type_: str, value: float | None) -> Violation:
        if type_ == optimizer and value is None and key.advice is not None:
            return f"optimizer.type {optimizer} needs optimizer.{key.name}", key.advice
        if type_ != optimizer and value is not None:
            return f"optimizer.{key.name} is for {optimizer} only", f"remove it, or set optimizer.type to {optimizer}"
        return None

    return check, ("optimizer.type", f"optimizer.{key.name}")


def _min_lr(min_lr: float, lr: float) -> Violation:
    if min_lr < lr:
        return None
    return (
        "schedule.min_lr is not less than optimizer.lr",
        "lower schedule.min_lr; 0 or a tenth of the peak is usual",
    )


def _decay(type_: str, decay: int | None) -> Violation:
    if type_ == "wsd" and decay is None:
        return (
            "schedule.type wsd needs schedule.decay_updates",
            "give the number of updates of the decay at the end",
        )
    if type_ != "wsd" and decay is not None:
        return "schedule.decay_updates is for wsd only", "remove it, or set schedule.type to wsd"
    return None


def _one_length(updates: Any, tokens: Any, epochs: Any) -> Violation:
    values = {"updates": updates, "tokens": tokens, "epochs": epochs}
    given = [name for name, value in values.items() if value is not None]
    if len(given) == 1:
        return None
    if not given:
        return "the length of training is missing", "give one of length.updates, length.tokens and length.epochs"
    return (
        "the length of training is given more than once",
        f"keep one and set the other to null: length.{given[-1]}=null",
    )


def check_schedule_fits(warmup: int, decay: int | None, total: int | None) -> Violation:
    """Check that warm-up and decay together are not longer than training.

    Args:
        warmup: number of updates of the warm-up at the start.
        decay: number of updates of the decay at the end; None if the schedule has no such phase.
        total: number of updates of the whole training; None if it is not known yet.

    Returns:
        (what is wrong, what to do), or None if they fit.
    """
    if total is None:
        return None
    if warmup >= total:
        what = f"schedule.warmup_updates is not less than the length of {total} updates"
        return what, "warm up for fewer updates, or train longer; 1 to 5 % of the length is usual"
    if warmup + (decay or 0) > total:
        what = f"warm-up and decay together are longer than the {total} updates of training"
        return what, "shorten one of them, or train longer"
    return None


SCHEDULE_FITS = (check_schedule_fits, ("schedule.warmup_updates", "schedule.decay_updates", "length.updates"))

RULES: tuple[Rule, ...] = (
    (_init_from, ("init_from",)),
    (_preset, ("model.preset",)),
    (_head_dimension, ("model.d_model", "model.n_head")),
    (_query_groups, ("model.n_head", "model.n_kv_head")),
    (_rotary_head_dimension, ("model.d_model", "model.n_head", "model.position")),
    (_sources, ("data.train", "data.validation")),
    (_eod, ("data.document_mask", "data.eod", "model.vocab_size")),
    (_skip, ("data.skip",)),
    *(_only_for(optimizer, key) for optimizer, facts in OPTIMIZERS.items() for key in facts.keys),
    (_min_lr, ("schedule.min_lr", "optimizer.lr")),
    (_decay, ("schedule.type", "schedule.decay_updates")),
    (_one_length, ("length.updates", "length.tokens", "length.epochs")),
    SCHEDULE_FITS,
    (_validation, ("evaluation.every", "data.validation")),
    (_prompt, ("evaluation.prompt", "evaluation.every", "data.tokenizer")),
)
