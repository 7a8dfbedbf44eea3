"""A DeepSpeed config and a recipe made into one resolved config, or every reason why not."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagpt.ds_config.batch import ACCUMULATION, MICRO, Batch, divide
from megagpt.ds_config.checking import Checker
from megagpt.ds_config.layout import Layout, Resolved
from megagpt.ds_config.owners import Owned, foreign_parameters, owned, second_owners
from megagpt.ds_config.parallel import SEQUENCE, STAGES, TENSOR, Degrees, degrees, impossible
from megagpt.ds_config.precision import KEYS, fill_precision, resolve_precision
from megagpt.ds_config.reading import read_json
from megagpt.ds_config.recomputation import BLOCKS, against_recomputation, fill_recomputation, recomputed
from megagpt.ds_config.refusals import STAGE, layout_dependent, refusals
from megagpt.ds_config.view import View
from megagpt.errors import Problem, UserError
from megagpt.recipe import Recipe

_FILLED = (MICRO, ACCUMULATION, "data_types.grad_accum_dtype", BLOCKS, *KEYS)
_NEVER_PRINTED = 10**9


def load(
    path: str | Path, recipe: Recipe, world_size: int, known: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Resolved:
    """Resolve a DeepSpeed config for a recipe on `world_size` ranks.

    `known` is engine.keys.known_keys(). Of the overrides only words that begin with `ds.` count.
    Raises UserError with every mistake at once.
    """
    tree = read_json(path)
    for word in overrides:
        if word.startswith("ds."):
            tree.override(word, prefix="ds.")
    values = owned(recipe)
    auto_allowed = frozenset([*_FILLED, *(value.key for value in values)])
    problems, broken = Checker(tree, known, auto_allowed).check()
    view = View(tree, broken)
    recipe, against = resolve_precision(view, recipe)
    problems += tree.problems + against
    problems += [*second_owners(view, recipe, values), *foreign_parameters(view, values)]
    layout, notes, found = _layout(view, recipe, world_size)
    problems += found
    if layout is None or problems:
        raise UserError.of(problems)
    notes += layout_dependent(view)
    return Resolved(_fill(tree.values, recipe, layout, values), layout, recipe, tuple(notes))


def _layout(view: View, recipe: Recipe, world_size: int) -> tuple[Layout | None, list[str], list[Problem]]:
    cut = degrees(view)
    stage, notes = _stage(view, recipe, cut)
    problems = [*refusals(view, world_size), *impossible(view, recipe, cut)]
    problems += against_recomputation(view, recipe.model.n_layer)
    ranks, rest = divmod(world_size, cut.ranks)
    if rest:
        what = f"a world of {world_size} does not divide by {cut.ranks}, the ranks of one copy"
        do = f"start a multiple of {cut.ranks} ranks"
        keys = [key for key in (STAGES, TENSOR, SEQUENCE) if view.given(key)]
        return None, notes, [*problems, view.problem(what, keys, do)]
    batch = divide(view, recipe, ranks, cut)
    if not isinstance(batch, Batch):
        return None, notes, [*problems, batch]
    again = recomputed(view, recipe.model.n_layer)
    parts = (cut.stages, cut.tensor, cut.sequence)
    layout = Layout(world_size, ranks, batch.micro, batch.accumulation, stage, *parts, *again)
    return layout, notes, problems


def _stage(view: View, recipe: Recipe, cut: Degrees) -> tuple[int, list[str]]:
    """The ZeRO stage that runs: DeepSpeed's stage 0 is wrong in low precision and in pipelines."""
    stage = view.number(STAGE, 0)
    if stage == 0 and recipe.precision != "fp32":
        why = "DeepSpeed's stage 0 begins with an Adam step on zero gradients"
        return 1, [f"{recipe.precision} runs at ZeRO stage 1 instead of 0: {why}"]
    if stage == 0 and cut.stages > 1:
        return 1, ["the pipeline runs at ZeRO stage 1 instead of 0: there each stage clips by its own norm"]
    if stage == 0 and cut.tensor > 1:
        return 1, ["tensor parallelism runs at ZeRO stage 1 instead of 0: there each part clips by its own norm"]
    return int(stage), []


def _fill(values: Mapping[str, Any], recipe: Recipe, layout: Layout, owners: Sequence[Owned]) -> dict[str, Any]:
    """The JSON for deepspeed.initialize, which gets optimizer and schedule as objects beside it."""
    config = copy.deepcopy(dict(values))
    for block in ("optimizer", "scheduler"):
        config.pop(block, None)
    config.update({value.key: value.value for value in owners if "." not in value.key})
    config[MICRO], config[ACCUMULATION] = layout.micro_batch, layout.accumulation
    config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": layout.zero_stage}
    fill_precision(config, recipe.precision or "fp32")
    fill_recomputation(config, layout.recomputed_blocks)
    config["zero_allow_untested_optimizer"] = True  # ours: torch's AdamW, or Muon
    config["zero_force_ds_cpu_optimizer"] = False
    config.setdefault("steps_per_print", _NEVER_PRINTED)
    config.setdefault("wall_clock_breakdown", False)
    return config
