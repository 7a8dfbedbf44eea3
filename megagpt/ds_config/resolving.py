"""A DeepSpeed config and a recipe made into one resolved config, or every reason why not."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagpt.ds_config.batch import ACCUMULATION_KEY, MICRO_BATCH_KEY, BatchSplit, split_batch
from megagpt.ds_config.checking import KeyChecker
from megagpt.ds_config.layout import Layout, Resolved
from megagpt.ds_config.owners import OwnedKey, ignored_parameters, owned_keys, ownership_conflicts
from megagpt.ds_config.parallel import (
    PIPELINE_STAGES_KEY,
    SEQUENCE_PARALLEL_KEY,
    TENSOR_PARALLEL_KEY,
    ParallelDegrees,
    parallel_degrees,
    parallel_problems,
)
from megagpt.ds_config.precision import PRECISION_KEYS, fill_precision, resolve_precision
from megagpt.ds_config.reading import read_hjson
from megagpt.ds_config.recomputation import (
    RECOMPUTED_BLOCKS_KEY,
    fill_recomputation,
    recomputation,
    recomputation_problems,
)
from megagpt.ds_config.refusals import ZERO_STAGE_KEY, numerics_notes, unsupported_settings
from megagpt.ds_config.view import ConfigView
from megagpt.errors import Problem, UserError
from megagpt.recipe import Recipe

_FILLED = (MICRO_BATCH_KEY, ACCUMULATION_KEY, "data_types.grad_accum_dtype", RECOMPUTED_BLOCKS_KEY, *PRECISION_KEYS)
_NEVER_PRINTED = 10**9


def load(
    path: str | Path, recipe: Recipe, world_size: int, known: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Resolved:
    """Resolve a DeepSpeed config for a recipe on `world_size` ranks.

    `known` is engine.keys.known_keys(). Of the overrides only words that begin with `ds.` count.
    Raises UserError with every mistake at once.
    """
    tree = read_hjson(path)
    for word in overrides:
        if word.startswith("ds."):
            tree.override(word, prefix="ds.")
    values = owned_keys(recipe)
    auto_allowed = frozenset([*_FILLED, *(value.key for value in values)])
    problems, broken = KeyChecker(tree, known, auto_allowed).check()
    view = ConfigView(tree, broken)
    recipe, against = resolve_precision(view, recipe)
    problems += tree.problems + against
    problems += [*ownership_conflicts(view, recipe, values), *ignored_parameters(view, values)]
    layout, notes, found = _layout(view, recipe, world_size)
    problems += found
    if layout is None or problems:
        raise UserError.from_problems(problems)
    notes += numerics_notes(view)
    return Resolved(_fill(tree.values, recipe, layout, values), layout, recipe, tuple(notes))


def _layout(view: ConfigView, recipe: Recipe, world_size: int) -> tuple[Layout | None, list[str], list[Problem]]:
    cut = parallel_degrees(view)
    stage, notes = _stage(view, recipe, cut)
    problems = [*unsupported_settings(view, world_size), *parallel_problems(view, recipe, cut)]
    problems += recomputation_problems(view, recipe.model.n_layer)
    ranks, rest = divmod(world_size, cut.ranks)
    if rest:
        what = f"a world of {world_size} does not divide by {cut.ranks}, the ranks of one copy"
        do = f"start a multiple of {cut.ranks} ranks"
        keys = [key for key in (PIPELINE_STAGES_KEY, TENSOR_PARALLEL_KEY, SEQUENCE_PARALLEL_KEY) if view.is_given(key)]
        return None, notes, [*problems, view.problem(what, keys, do)]
    batch = split_batch(view, recipe, ranks, cut)
    if not isinstance(batch, BatchSplit):
        return None, notes, [*problems, batch]
    again = recomputation(view, recipe.model.n_layer)
    parts = (cut.stages, cut.tensor, cut.sequence)
    layout = Layout(world_size, ranks, batch.micro, batch.accumulation, stage, *parts, *again)
    return layout, notes, problems


def _stage(view: ConfigView, recipe: Recipe, cut: ParallelDegrees) -> tuple[int, list[str]]:
    """The ZeRO stage that runs: DeepSpeed's stage 0 is wrong in low precision and in pipelines."""
    stage = view.explicit(ZERO_STAGE_KEY, 0)
    if stage == 0 and recipe.precision != "fp32":
        why = "DeepSpeed's stage 0 begins with an Adam step on zero gradients"
        return 1, [f"{recipe.precision} runs at ZeRO stage 1 instead of 0: {why}"]
    if stage == 0 and cut.stages > 1:
        return 1, ["the pipeline runs at ZeRO stage 1 instead of 0: there each stage clips by its own norm"]
    if stage == 0 and cut.tensor > 1:
        return 1, ["tensor parallelism runs at ZeRO stage 1 instead of 0: there each part clips by its own norm"]
    return int(stage), []


def _fill(values: Mapping[str, Any], recipe: Recipe, layout: Layout, owners: Sequence[OwnedKey]) -> dict[str, Any]:
    """The JSON for deepspeed.initialize, which gets optimizer and schedule as objects beside it."""
    config = copy.deepcopy(dict(values))
    for block in ("optimizer", "scheduler"):
        config.pop(block, None)
    config.update({value.key: value.value for value in owners if "." not in value.key})
    config[MICRO_BATCH_KEY], config[ACCUMULATION_KEY] = layout.micro_batch, layout.accumulation
    config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": layout.zero_stage}
    fill_precision(config, recipe.precision or "fp32")
    fill_recomputation(config, layout.recomputed_blocks)
    config["zero_allow_untested_optimizer"] = True  # ours: torch's AdamW, or Muon
    config["zero_force_ds_cpu_optimizer"] = False
    config.setdefault("steps_per_print", _NEVER_PRINTED)
    config.setdefault("wall_clock_breakdown", False)
    return config
