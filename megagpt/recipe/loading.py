"""From a YAML file and `key=value` words to a Recipe, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import yaml

from megagpt.errors import UserError
from megagpt.recipe.sections import Recipe


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe. Raises UserError with every mistake in it."""
    return Recipe.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, in order. Loads back equal."""
    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def updates(recipe: Recipe, samples_per_epoch: int) -> int:
    """Number of updates that the recipe's length means, rounded up to whole updates."""
    length, per_update = recipe.length, recipe.batch.global_size
    if length.updates is not None:
        return length.updates
    if length.tokens is not None:
        return math.ceil(Fraction(length.tokens, per_update * recipe.model.seq_len))
    if length.epochs is None:
        raise UserError("the recipe has no length")
    return math.ceil(Fraction(str(length.epochs)) * samples_per_epoch / per_update)
