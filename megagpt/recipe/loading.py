"""From a YAML file and `key=value` words to a Recipe, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import yaml

from megagpt.errors import UserError
from megagpt.recipe.checking import check
from megagpt.recipe.places import SourceLocations
from megagpt.recipe.reading import CoreDumper, read_yaml
from megagpt.recipe.rules import check_schedule_fits
from megagpt.recipe.sections import Recipe
from megagpt.recipe.wording import TableRow, format_table


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with `key=value` overrides; words that begin with `ds.` are not for the recipe.

    Raises UserError with every mistake of the file and the words at once.
    """
    tree = read_yaml(path)
    for word in overrides:
        if not word.startswith("ds."):
            tree.override(word)
    recipe, found = check(tree)
    problems = [*tree.problems, *found]
    if recipe is None or problems:
        raise UserError.from_problems(problems)
    recipe._locations = SourceLocations(tree.locations)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, in order. Loads back equal."""
    values = recipe.model_dump(mode="json")
    return str(yaml.dump(values, Dumper=CoreDumper, sort_keys=False, allow_unicode=True))


def total_updates(recipe: Recipe, samples_per_epoch: int) -> int:
    """Updates of the recipe's length: tokens and epochs are rounded up, so that none is left out.

    A sample counts as seq_len tokens. Raises UserError if warm-up and decay do not fit in.
    """
    length, per_update = recipe.length, recipe.batch.global_size
    if length.updates is not None:
        return length.updates
    if length.tokens is not None:
        key, total = "length.tokens", Fraction(length.tokens, per_update * recipe.model.seq_len)
    else:
        key, total = "length.epochs", Fraction(str(length.epochs)) * samples_per_epoch / per_update
    schedule, whole = recipe.schedule, math.ceil(total)
    finding = check_schedule_fits(schedule.warmup_updates, schedule.decay_updates, whole)
    if finding:
        rows: list[TableRow] = [(key, length.tokens or length.epochs, recipe.location(key))]
        rows.append(("schedule.warmup_updates", schedule.warmup_updates, recipe.location("schedule.warmup_updates")))
        if schedule.decay_updates is not None:
            rows.append(("schedule.decay_updates", schedule.decay_updates, recipe.location("schedule.decay_updates")))
        raise UserError(finding[0], format_table(rows), finding[1])
    return whole
