"""`megagpt parity`: does this layout, on these machines, train the same as one process? Before months are spent."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.cluster import Collectives, Rank, from_environment, preflight
from megagpt.cluster.rendezvous import meeting
from megagpt.config import deepspeed as ds_config
from megagpt.config import recipe as recipes
from megagpt.errors import EXIT_DONE, EXIT_FAILURE
from megagpt.training.console import Console
from megagpt.training.watchdog import EVALUATE, PASSES, Watch

if TYPE_CHECKING:
    from megagpt.config.deepspeed import Resolved
    from megagpt.data.loader import Batch
    from megagpt.engine.base import Engine
    from megagpt.parity.certificate import Certificate
    from megagpt.parity.curve import Curve
    from megagpt.state import UpdateResult

_HELD_OUT_FROM = 1_000_000  # a data position far from what is trained on
_REAL_LENGTH = 8  # updates of the schedule of which the real shape makes one


@dataclass(frozen=True)
class Options:
    """What the command line says; see `megagpt parity --help`."""

    recipe: Path
    deepspeed_config: Path
    overrides: tuple[str, ...] = ()
    updates: int = 20


def parity(options: Options) -> int:
    """Print a certificate for this layout, or what is wrong with it.

    The stages of the real shape are built on the meta device, the shrunk recipe is trained on this layout and in one
    process, and one update of the real shape is made if it fits. Every rank calls it. Exit code 0 for the same curve,
    1 for another. What libraries say goes to logs in the run
    directory's folder `parity`. Raises UserError where the recipe and the config do not fit together.
    """
    run_dir = recipes.load(options.recipe, options.overrides).run_dir
    with meeting(from_environment(os.environ), f"the parity of {Path(run_dir).absolute()}") as rank:
        return _certify(options, rank, run_dir)


def _certify(options: Options, rank: Rank, run_dir: str) -> int:
    with Console(Path(run_dir) / "parity", rank.rank) as console:  # before DeepSpeed is imported, which prints
        certificate = _prove(options, _resolve(options, rank, ()), rank, console)
        console.say(str(certificate))
    return EXIT_DONE if certificate.good else EXIT_FAILURE


def _prove(options: Options, real: Resolved, rank: Rank, console: Console) -> Certificate:
    """Check the stages of the real shape, train the small run, then make one update of the real shape if it fits.

    The stages come first: a pipeline whose stages do not fit together would hang instead of answering.
    """
    from megagpt.engine import build
    from megagpt.engine import init_deepspeed as start
    from megagpt.parity import curve, real_shape, reference, shrink
    from megagpt.parity.certificate import Certificate

    start.start(rank)
    collectives = Collectives(rank.world_size)
    small = _resolve(options, rank, shrink.overrides(real, options.updates, None))
    proof = Certificate(real, small, options.updates, real_shape.build_stages(real))
    if proof.good:
        small, updates, held_out, expected = _reference(options, real, rank, collectives)
        engine = build.build(small, options.updates, rank, collectives)
        with _watched(real, rank, collectives, console) as watch:
            got = _train(engine, small, updates, held_out, rank, watch)
        engine.release()
        tolerance = curve.allowed(small.recipe, expected, reference.train(small.recipe, updates, held_out, exact=True))
        proof = replace(proof, small=small, differences=curve.compare(small.recipe, expected, got, tolerance))
        if not collectives.any(not proof.good):
            proof = _real_update(options, proof, rank, collectives, console)
    start.stop()
    return proof


@contextlib.contextmanager
def _watched(real: Resolved, rank: Rank, collectives: Collectives, console: Console) -> Iterator[Watch]:
    """Watch the updates made in this context: a hang ends the process, with the ranks' phases and stacks."""
    hosts = preflight.hosts_of(collectives.all_gather_object(preflight.facts_here({}, {})))
    folder, seconds = console.log_path.parent, real.recipe.log.hang_after
    with Watch(folder, rank.rank, hosts, seconds, alarm=console.alarm, warn=console.alarm) as watch:
        yield watch


def _real_update(
    options: Options, proof: Certificate, rank: Rank, collectives: Collectives, console: Console
) -> Certificate:
    """Make one update of the real model on the real layout if it fits, and add to the certificate what came of it.

    Rank 0 also repeats the loss in one process if a CPU can.
    """
    from megagpt.engine import build
    from megagpt.parity import curve, real_shape, reference, shrink
    from megagpt.parity.certificate import RealUpdate

    number = real_shape.micro_batches(proof.real.layout)
    one = _resolve(options, rank, shrink.one_update(proof.real, number, _REAL_LENGTH))
    if obstacle := real_shape.obstacle(one, collectives):
        return replace(proof, obstacle=obstacle)
    batch = shrink.samples(one.recipe.model, one.recipe.batch.global_size, 0)
    engine = build.build(one, _REAL_LENGTH, rank, collectives)
    with _watched(one, rank, collectives, console) as watch:
        watch.enter(PASSES, 1)
        result = _update(engine, _share(batch, one, rank))
    engine.release()
    made = RealUpdate(number, result.loss, result.grad_norm, result.made)
    if real_shape.comparable(one):
        alone = reference.train(one.recipe, [batch], batch) if rank.main else None
        loss, norm = (
            collectives.all_reduce_sum(values[0]) for values in ([alone.losses, alone.norms] if alone else [[0.0]] * 2)
        )
        made = replace(made, differences=curve.of_update(one.recipe, (made.loss, made.norm), (loss, norm)))
    return replace(proof, update=made)


def _resolve(options: Options, rank: Rank, more: Sequence[str]) -> Resolved:
    from megagpt.engine import deepspeed_keys

    words = (*options.overrides, *more)
    recipe = recipes.load(options.recipe, words)
    return ds_config.load(options.deepspeed_config, recipe, rank.world_size, deepspeed_keys.known_keys(), words)


def _reference(
    options: Options, real: Resolved, rank: Rank, collectives: Collectives
) -> tuple[Resolved, list[Batch], Batch, Curve]:
    """The small run, its batches, and what one process makes of them. Clipping acts in about half of the updates."""
    from megagpt.parity import reference, shrink

    clip = None
    for attempt in ("without clipping", "with"):
        small = _resolve(options, rank, shrink.overrides(real, options.updates, clip))
        size, model = small.recipe.batch.global_size, small.recipe.model
        updates = [shrink.samples(model, size, number * size) for number in range(options.updates)]
        held_out = shrink.samples(model, size, _HELD_OUT_FROM)
        expected = reference.train(small.recipe, updates, held_out)
        if attempt == "with" or real.recipe.optimizer.clip is None:
            break
        # rank 0's, so that different machines do not clip at limits that differ by a rounding
        clip = collectives.all_reduce_sum(statistics.median(expected.norms) if rank.main else 0.0)
    return small, updates, held_out, expected


def _train(
    engine: Engine, small: Resolved, updates: Sequence[Batch], held_out: Batch, rank: Rank, watch: Watch
) -> Curve:
    """Train the layout on the same batches."""
    from megagpt.parity.curve import Curve

    initial = {name: value.clone() for name, value in engine.weights()}  # at stage 0 they are the live ones
    before = _evaluate(engine, _share(held_out, small, rank))
    results = []
    for number, batch in enumerate(updates, start=1):
        watch.enter(PASSES, number)
        results.append(_update(engine, _share(batch, small, rank)))
    watch.enter(EVALUATE, len(updates))
    after = _evaluate(engine, _share(held_out, small, rank))
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


def _evaluate(engine: Engine, batches: Sequence[Batch]) -> float:
    loss = engine.evaluate(batches)
    assert loss is not None  # nothing asks this evaluation to stop
    return loss


def _share(batch: Batch, small: Resolved, rank: Rank) -> list[Batch]:
    """This rank's micro-batches, as the loader gives them."""
    layout = small.layout
    first, step = layout.data_rank(rank.rank) * layout.micro_batch, layout.micro_batch * layout.data_parallel
    starts = range(first, len(batch.labels), step)
    return [type(batch)(*(tensor[start : start + layout.micro_batch] for tensor in batch)) for start in starts]
