"""`megagpt parity`: does this layout, on these machines, train the same as one process? Before months are spent."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt import ds_config
from megagpt import recipe as recipes
from megagpt.distributed import Agreement, Rank, from_environment
from megagpt.distributed.meeting import meeting
from megagpt.errors import EXIT_DONE, EXIT_FAILURE
from megagpt.run.console import Console

if TYPE_CHECKING:
    from megagpt.data.loader import Batch
    from megagpt.ds_config import Resolved
    from megagpt.engine.base import Engine
    from megagpt.parity.curve import Curve, Difference
    from megagpt.state import UpdateResult

_HELD_OUT_FROM = 1_000_000  # a data position far from what is trained on


@dataclass(frozen=True)
class Options:
    """What the command line says; see `megagpt parity --help`."""

    recipe: Path
    deepspeed_config: Path
    overrides: tuple[str, ...] = ()
    updates: int = 20


def parity(options: Options) -> int:
    """Shrink the recipe, train it on this layout and in one process, and print a certificate or what differs.

    Every rank calls it. Exit code 0 for the same curve, 1 for another. What libraries say goes to logs in the run
    directory's folder `parity`. Raises UserError where the recipe and the config do not fit together.
    """
    run_dir = recipes.load(options.recipe, options.overrides).run_dir
    with meeting(from_environment(os.environ), f"the parity of {Path(run_dir).absolute()}") as rank:
        return _certify(options, rank, run_dir)


def _certify(options: Options, rank: Rank, run_dir: str) -> int:
    console = Console(Path(run_dir) / "parity", rank.rank)  # before DeepSpeed is imported, which prints
    try:
        whole = _resolve(options, rank, ())
        small, found = _differences(options, whole, rank)
        console.say(_report(small, found, options.updates))
    finally:
        console.close()
    return EXIT_FAILURE if any(row.too_far for row in found) else EXIT_DONE


def _differences(options: Options, whole: Resolved, rank: Rank) -> tuple[Resolved, list[Difference]]:
    """The small run, and every number that the layout and one process make of it, compared."""
    from megagpt.engine import build, start
    from megagpt.parity import curve, reference

    start.start(rank)
    agreement = Agreement(rank.world_size)
    small, updates, held_out, expected = _reference(options, whole, rank, agreement)
    engine = build.build(small, options.updates, rank, agreement)
    got = _train(engine, small, updates, held_out, rank)
    engine.close()
    tolerance = curve.allowed(small.recipe, expected, reference.train(small.recipe, updates, held_out, exact=True))
    return small, curve.compare(small.recipe, expected, got, tolerance)


def _resolve(options: Options, rank: Rank, more: Sequence[str]) -> Resolved:
    from megagpt.engine import keys

    words = (*options.overrides, *more)
    recipe = recipes.load(options.recipe, words)
    return ds_config.load(options.deepspeed_config, recipe, rank.world_size, keys.known_keys(), words)


def _reference(
    options: Options, whole: Resolved, rank: Rank, agreement: Agreement
) -> tuple[Resolved, list[Batch], Batch, Curve]:
    """The small run, its batches, and what one process makes of them. Clipping acts in about half of the updates."""
    from megagpt.parity import reference, shrink

    clip = None
    for attempt in ("without clipping", "with"):
        small = _resolve(options, rank, shrink.words(whole, options.updates, clip))
        size, model = small.recipe.batch.global_size, small.recipe.model
        updates = [shrink.samples(model, size, number * size) for number in range(options.updates)]
        held_out = shrink.samples(model, size, _HELD_OUT_FROM)
        expected = reference.train(small.recipe, updates, held_out)
        if attempt == "with" or whole.recipe.optimizer.clip is None:
            break
        # rank 0's, so that different machines do not clip at limits that differ by a rounding
        clip = agreement.total(statistics.median(expected.norms) if rank.main else 0.0)
    return small, updates, held_out, expected


def _train(engine: Engine, small: Resolved, updates: Sequence[Batch], held_out: Batch, rank: Rank) -> Curve:
    """What the layout makes of the same batches."""
    from megagpt.parity.curve import Curve

    initial = {name: value.clone() for name, value in engine.weights()}  # at stage 0 they are the live ones
    before = engine.evaluate(_share(held_out, small, rank))
    results = [_update(engine, _share(batch, small, rank)) for batch in updates]
    after = engine.evaluate(_share(held_out, small, rank))
    final = {name: value.clone() for name, value in engine.weights()}
    rows = ([row.loss, row.grad_norm, row.lr, row.tokens] for row in results)
    losses, norms, rates, tokens = (list(column) for column in zip(*rows, strict=True))
    return Curve(losses, norms, rates, [int(number) for number in tokens], [before, after], initial, final)


def _update(engine: Engine, batches: Sequence[Batch]) -> UpdateResult:
    """One update; where fp16's gradient overflows it is made again at a lower scale, as in a run."""
    result = engine.train_update(batches)
    while not result.made and math.isfinite(result.loss) and result.scale and result.scale.value > result.scale.minimum:
        result = engine.train_update(batches)
    return result


def _share(batch: Batch, small: Resolved, rank: Rank) -> list[Batch]:
    """This rank's micro-batches, as the loader gives them."""
    layout = small.layout
    first, step = layout.data_rank(rank.rank) * layout.micro_batch, layout.micro_batch * layout.data_parallel
    starts = range(first, len(batch.labels), step)
    return [type(batch)(*(tensor[start : start + layout.micro_batch] for tensor in batch)) for start in starts]


def _report(small: Resolved, found: Sequence[Difference], updates: int) -> str:
    """The certificate, or what differs first."""
    from megagpt.parity.curve import KINDS, worst

    layout, model = small.layout, small.recipe.model
    wrong = [row for row in found if row.too_far]
    rows = [worst(found, kind) for kind in KINDS]
    versions = ", ".join(f"{name} {version(name)}" for name in ("megagpt", "deepspeed", "torch"))
    lines = [
        f"parity   {layout}, {layout.batch_product} samples per update, {small.recipe.precision}",
        f"model    the recipe's, shrunk to {model.n_layer} blocks of width {model.d_model}; {updates} updates",
        f"versions {versions}",
        "",
        *(f"{row.kind:9}largest relative difference {row.off:.1e}, allowed {row.limit:.0e}" for row in rows),
        "",
    ]
    if not wrong:
        return "\n".join([*lines, "the same curve as one process, update by update"])
    first = "\n".join(f"  {row}" for row in wrong[:3])
    return "\n".join([*lines, f"ANOTHER CURVE than one process; {len(wrong)} numbers differ, first:", first])
