"""Resolve a DeepSpeed config for a recipe: fill in every "auto", or report every problem."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megagpt.config.deepspeed.activation_checkpointing import (
    RECOMPUTED_BLOCKS_KEY,
    fill_recomputation,
    recomputation,
    recomputation_problems,
)
from megagpt.config.deepspeed.batch import ACCUMULATION_KEY, MICRO_BATCH_KEY, BatchSplit, split_batch
from megagpt.config.deepspeed.layout import Layout, Resolved
from megagpt.config.deepspeed.ownership import OwnedKey, ignored_parameters, owned_keys, ownership_conflicts
from megagpt.config.deepspeed.parallelism import (
    PIPELINE_STAGES_KEY,
    SEQUENCE_PARALLEL_KEY,
    TENSOR_PARALLEL_KEY,
    ParallelDegrees,
    parallel_degrees,
    parallel_problems,
)
from megagpt.config.deepspeed.precision import PRECISION_KEYS, fill_precision, resolve_precision
from megagpt.config.deepspeed.unsupported import ZERO_STAGE_KEY, numerics_notes, unsupported_settings
from megagpt.config.deepspeed.validate import KeyChecker, expand_paths, is_literal
from megagpt.config.deepspeed.view import ConfigView
from megagpt.config.recipe import Recipe
from megagpt.config.syntax.hjson_reader import read_hjson
from megagpt.errors import Problem, UserError

FILLED_KEYS = (MICRO_BATCH_KEY, ACCUMULATION_KEY, "data_types.grad_accum_dtype", RECOMPUTED_BLOCKS_KEY, *PRECISION_KEYS)
"""Keys whose value may be "auto", in addition to the owned keys of ownership.py."""
_NEVER_PRINT = 10**9


def load(
    path: str | Path, recipe: Recipe, world_size: int, known: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Resolved:
    """Resolve a DeepSpeed config for a recipe.

    Args:
        path: the JSON file.
        recipe: the recipe.
        world_size: total number of ranks.
        known: the keys that DeepSpeed knows, from `engine.deepspeed_keys.known_keys()` or
            `known_keys.recorded_keys()`.
        overrides: `ds.key=value` arguments that replace values of the file. Other arguments override the recipe
            instead and are ignored here.

    Returns:
        The resolved config, its layout, the recipe with its precision filled in, and notes for the user.

    Raises:
        UserError: The config is invalid or does not fit the recipe. The error lists all mistakes at once.
    """
    if Path(path).suffix in (".yaml", ".yml"):
        do = "give a DeepSpeed config (JSON), such as those in ds_configs, and the recipe as --recipe"
        raise UserError("this is a YAML file, not a DeepSpeed config", str(path), do)
    tree = read_hjson(path)
    for argument in overrides:
        if argument.startswith("ds."):
            tree.override(argument, prefix="ds.", is_literal=partial(is_literal, known))
    expand_paths(tree)
    values = owned_keys(recipe)
    auto_allowed = frozenset([*FILLED_KEYS, *(value.key for value in values)])
    problems, broken = KeyChecker(tree, known, auto_allowed).check()
    view = ConfigView(tree, broken)
    recipe, precision_problems = resolve_precision(view, recipe)
    problems += tree.problems + precision_problems
    problems += [*ownership_conflicts(view, recipe, values), *ignored_parameters(view, values)]
    layout, notes, layout_problems = _resolve_layout(view, recipe, world_size)
    problems += layout_problems
    if layout is None or problems:
        raise UserError.from_problems(problems)
    notes += numerics_notes(view)
    return Resolved(_fill(tree.values, recipe, layout, values), layout, recipe, tuple(notes))


def _resolve_layout(
    view: ConfigView, recipe: Recipe, world_size: int
) -> tuple[Layout | None, list[str], list[Problem]]:
    """Return the layout (None if no layout is possible), notes for the user, and the problems."""
    degrees = parallel_degrees(view)
    zero_stage, notes = _zero_stage(view, recipe, degrees)
    problems = [*unsupported_settings(view, world_size), *parallel_problems(view, recipe, degrees)]
    problems += recomputation_problems(view, recipe.model.n_layer)
    replicas, remainder = divmod(world_size, degrees.ranks)
    if remainder:
        what = f"the world size {world_size} is not a multiple of {degrees.ranks}, the ranks of one model replica"
        do = f"start a multiple of {degrees.ranks} ranks"
        keys = [key for key in (PIPELINE_STAGES_KEY, TENSOR_PARALLEL_KEY, SEQUENCE_PARALLEL_KEY) if view.is_given(key)]
        return None, notes, [*problems, view.problem(what, keys, do)]
    batch = split_batch(view, recipe, replicas, degrees)
    if not isinstance(batch, BatchSplit):
        return None, notes, [*problems, batch]
    recomputed_blocks, activations_on_host = recomputation(view, recipe.model.n_layer)
    layout = Layout(
        world_size=world_size,
        data_parallel=replicas,
        micro_batch=batch.micro,
        accumulation=batch.accumulation,
        zero_stage=zero_stage,
        pipeline_stages=degrees.stages,
        tensor_parallel=degrees.tensor,
        sequence_parallel=degrees.sequence,
        recomputed_blocks=recomputed_blocks,
        activations_on_host=activations_on_host,
    )
    return layout, notes, problems


def _zero_stage(view: ConfigView, recipe: Recipe, degrees: ParallelDegrees) -> tuple[int, list[str]]:
    """Return the ZeRO stage to use, and a note if it differs from the one in the config.

    DeepSpeed's stage 0 gives wrong results in low precision, in pipelines and with tensor parallelism.
    """
    stage = view.explicit(ZERO_STAGE_KEY, 0)
    if stage == 0 and recipe.precision != "fp32":
        why = "DeepSpeed's stage 0 starts with an Adam step on zero gradients"
        return 1, [f"{recipe.precision} runs at ZeRO stage 1 instead of 0: {why}"]
    if stage == 0 and degrees.stages > 1:
        return 1, ["the pipeline runs at ZeRO stage 1 instead of 0: at 0 each pipeline stage clips by its own norm"]
    if stage == 0 and degrees.tensor > 1:
        return 1, ["tensor parallelism runs at ZeRO stage 1 instead of 0: at 0 each rank clips by its own norm"]
    return int(stage), []


def _fill(values: Mapping[str, Any], recipe: Recipe, layout: Layout, owners: Sequence[OwnedKey]) -> dict[str, Any]:
    """Return the config for `deepspeed.initialize`, without optimizer and schedule, which are passed as objects."""
    config = copy.deepcopy(dict(values))
    for block in ("optimizer", "scheduler"):
        config.pop(block, None)
    config.update({value.key: value.value for value in owners if "." not in value.key})
    config[MICRO_BATCH_KEY], config[ACCUMULATION_KEY] = layout.micro_batch, layout.accumulation
    config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": layout.zero_stage}
    fill_precision(config, recipe.precision or "fp32")
    fill_recomputation(config, layout.recomputed_blocks)
    # DeepSpeed's list of tested optimizers does not include megagpt's own.
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    config.setdefault("steps_per_print", _NEVER_PRINT)
    config.setdefault("wall_clock_breakdown", False)
    return config
