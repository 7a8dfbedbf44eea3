"""Load a recipe from a YAML file and `key=value` overrides, and write a recipe as YAML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import yaml

from megagpt.config.recipe.checking import check_values, expand_paths, is_literal
from megagpt.config.recipe.rules import check_schedule_fits
from megagpt.config.recipe.sections import Recipe
from megagpt.config.syntax.formatting import TableRow, format_table
from megagpt.config.syntax.locations import SourceLocations
from megagpt.config.syntax.yaml_reader import CoreDumper, read_text, read_yaml
from megagpt.errors import UserError


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe.

    Args:
        path: the YAML file.
        overrides: `key=value` arguments that replace values of the file. Arguments that begin with `ds.` override the
            DeepSpeed config instead and are ignored here.

    Returns:
        The validated recipe.

    Raises:
        UserError: The file or an override is invalid. The error lists all mistakes at once.
    """
    refuse_deepspeed_config(path)
    tree = read_yaml(path)
    for argument in overrides:
        if not argument.startswith("ds."):
            tree.override(argument, is_literal=is_literal)
    unexpanded = expand_paths(tree)
    recipe, problems = check_values(tree)
    problems = [*tree.problems, *unexpanded, *problems]
    if recipe is None or problems:
        raise UserError.from_problems(problems)
    recipe._locations = SourceLocations(tree.locations)
    return recipe


_DEEPSPEED_SECTIONS = (
    "zero_optimization",
    "train_micro_batch_size_per_gpu",
    "activation_checkpointing",
    "bf16",
    "fp16",
)


def refuse_deepspeed_config(path: str | Path) -> None:
    """Raise UserError if a file that is given as a recipe is a DeepSpeed config."""
    if Path(path).suffix not in (".json", ".hjson"):
        return
    text = read_text(path)
    if any(f'"{name}"' in text for name in _DEEPSPEED_SECTIONS) and '"run_dir"' not in text:
        do = "give a recipe (YAML) as --recipe, and this file as --deepspeed_config"
        raise UserError("this is a DeepSpeed config, not a recipe", str(path), do)


def to_yaml(recipe: Recipe) -> str:
    """Return a recipe as YAML, with all keys and defaults in a fixed order. `load` reads it back as an equal recipe."""
    values = recipe.model_dump(mode="json")
    return str(yaml.dump(values, Dumper=CoreDumper, sort_keys=False, allow_unicode=True))


def total_updates(recipe: Recipe, samples_per_epoch: int) -> int:
    """Return the length of training in updates.

    A length in tokens or epochs is rounded up to whole updates. A sample counts as `model.seq_len` tokens.

    Args:
        recipe: the recipe.
        samples_per_epoch: number of samples in the training data. It is used only if the length is given in epochs.

    Returns:
        The number of updates.

    Raises:
        UserError: Warm-up and decay together are longer than training.
    """
    length, batch_size = recipe.length, recipe.batch.global_size
    if length.updates is not None:
        return length.updates
    if length.tokens is not None:
        key = "length.tokens"
        exact = Fraction(length.tokens, batch_size * recipe.model.seq_len)
    else:
        key = "length.epochs"
        # Converting through a string makes 1.1 exactly 11/10.
        exact = Fraction(str(length.epochs)) * samples_per_epoch / batch_size
    updates = math.ceil(exact)
    schedule = recipe.schedule
    violation = check_schedule_fits(schedule.warmup_updates, schedule.decay_updates, updates)
    if violation:
        what, do = violation
        rows: list[TableRow] = [(key, length.tokens or length.epochs, recipe.location(key))]
        for name in ("warmup_updates", "decay_updates"):
            value = getattr(schedule, name)
            if value is not None:
                rows.append((f"schedule.{name}", value, recipe.location(f"schedule.{name}")))
        raise UserError(what, format_table(rows), do)
    return updates
