"""Implementation of `megagpt parity`, which checks before a long run that a layout trains the same as one process."""

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
from megagpt.cluster.rendezvous import rendezvous
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

# First data position of the held-out samples, which is far from the positions that are trained on.
_HELD_OUT_FROM = 1_000_000
# Number of updates in the schedule of the real model, of which only the first is made.
_REAL_LENGTH = 8


@dataclass(frozen=True)
class ParityOptions:
    """Options of the command, as described by `megagpt parity --help`.

    Attributes:
        recipe: path of the recipe.
        deepspeed_config: path of the DeepSpeed config.
        overrides: `key=value` and `ds.key=value` arguments that override either file.
        updates: number of updates of the run with the shrunk model.
    """

    recipe: Path
    deepspeed_config: Path
    overrides: tuple[str, ...] = ()
    updates: int = 20


def parity(options: ParityOptions) -> int:
    """Print a certificate for a layout, or a description of what is wrong with it. Collective.

    The stages of the real model are built on the meta device, a shrunk recipe is trained both on this layout and in
    one process, and one update of the real model is made if it fits. The output of libraries goes to log files in the
    folder `parity` of the run directory.

    Args:
        options: Options of the command.

    Returns:
        The exit code, which is 0 if all checks passed, and 1 otherwise.

    Raises:
        UserError: The recipe or the DeepSpeed config is invalid, or they do not fit together.
    """
    run_dir = recipes.load(options.recipe, options.overrides).run_dir
    with rendezvous(from_environment(os.environ), f"the parity of {Path(run_dir).absolute()}") as rank:
        return _certify(options, rank, run_dir)


def _certify(options: ParityOptions, rank: Rank, run_dir: str) -> int:
    # The console must exist before DeepSpeed is imported, because the import already prints.
    with Console(Path(run_dir) / "parity", rank.rank) as console:
        certificate = _test_layout(options, _resolve(options, rank, ()), rank, console)
        console.say(str(certificate))
    return EXIT_DONE if certificate.passed else EXIT_FAILURE


def _test_layout(options: ParityOptions, real: Resolved, rank: Rank, console: Console) -> Certificate:
    """Check the stages of the real model, train the shrunk model, then make one update of the real model if it fits.

    The stages are checked first, because a pipeline whose stages do not fit together would hang.
    """
    from megagpt.engine import build
    from megagpt.engine import init_deepspeed as start
    from megagpt.parity import curve, real_shape, reference, shrink
    from megagpt.parity.certificate import Certificate

    start.start(rank)
    collectives = Collectives(rank.world_size)
    small = _resolve(options, rank, shrink.shrinking_overrides(real, options.updates, None))
    certificate = Certificate(real, small, options.updates, real_shape.build_stages(real))
    if certificate.passed:
        small, updates, held_out, expected = _train_reference(options, real, rank, collectives)
        engine = build.build(small, options.updates, rank, collectives)
        with _watched(real, rank, collectives, console) as watch:
            got = _train_layout(engine, small, updates, held_out, rank, watch)
        engine.release()
        tolerance = curve.calibrated_tolerance(
            small.recipe, expected, reference.train(small.recipe, updates, held_out, exact=True)
        )
        certificate = replace(
            certificate, small=small, differences=curve.compare(small.recipe, expected, got, tolerance)
        )
        if not collectives.any(not certificate.passed):
            certificate = _real_shape_update(options, certificate, rank, collectives, console)
    start.stop()
    return certificate


@contextlib.contextmanager
def _watched(real: Resolved, rank: Rank, collectives: Collectives, console: Console) -> Iterator[Watch]:
    """Watch the updates in this context. If one hangs, print the phase and stack of each rank and end the process."""
    hosts = preflight.locations_of_ranks(collectives.all_gather_object(preflight.describe_rank({}, {})))
    folder, seconds = console.log_path.parent, real.recipe.log.hang_after
    with Watch(folder, rank.rank, hosts, seconds, alarm=console.alarm, warn=console.alarm) as watch:
        yield watch


def _real_shape_update(
    options: ParityOptions, certificate: Certificate, rank: Rank, collectives: Collectives, console: Console
) -> Certificate:
    """Make one update of the real model on the real layout if it fits, and add the result to the certificate.

    If a single CPU process can compute the same update, rank 0 does so for comparison.
    """
    from megagpt.engine import build
    from megagpt.parity import curve, real_shape, reference, shrink
    from megagpt.parity.certificate import RealUpdate

    number = real_shape.micro_batches(certificate.real.layout)
    one = _resolve(options, rank, shrink.single_update_overrides(certificate.real, number, _REAL_LENGTH))
    if obstacle := real_shape.find_obstacle(one, collectives):
        return replace(certificate, obstacle=obstacle)
    batch = shrink.synthetic_samples(one.recipe.model, one.recipe.batch.global_size, 0)
    engine = build.build(one, _REAL_LENGTH, rank, collectives)
    with _watched(one, rank, collectives, console) as watch:
        watch.enter(PASSES, 1)
        result = _train_update(engine, _rank_batches(batch, one, rank))
    engine.release()
    made = RealUpdate(number, result.loss, result.grad_norm, result.made)
    if real_shape.can_repeat_in_one_process(one):
        loss = norm = 0.0
        if rank.main:
            alone = reference.train(one.recipe, [batch], batch)
            loss, norm = alone.losses[0], alone.norms[0]
        expected = collectives.all_reduce_sum(loss), collectives.all_reduce_sum(norm)
        made = replace(made, differences=curve.compare_update(one.recipe, (made.loss, made.norm), expected))
    return replace(certificate, update=made)


def _resolve(options: ParityOptions, rank: Rank, extra: Sequence[str]) -> Resolved:
    from megagpt.engine import deepspeed_keys

    overrides = (*options.overrides, *extra)
    recipe = recipes.load(options.recipe, overrides)
    return ds_config.load(options.deepspeed_config, recipe, rank.world_size, deepspeed_keys.known_keys(), overrides)


def _train_reference(
    options: ParityOptions, real: Resolved, rank: Rank, collectives: Collectives
) -> tuple[Resolved, list[Batch], Batch, Curve]:
    """Train the shrunk model in one process, with a clipping limit at which about half of the updates are clipped.

    Returns:
        The resolved config of the shrunk model, its batches, the held-out samples, and the curve.
    """
    from megagpt.parity import reference, shrink

    clip = None
    for attempt in ("without clipping", "with"):
        small = _resolve(options, rank, shrink.shrinking_overrides(real, options.updates, clip))
        size, model = small.recipe.batch.global_size, small.recipe.model
        updates = [shrink.synthetic_samples(model, size, number * size) for number in range(options.updates)]
        held_out = shrink.synthetic_samples(model, size, _HELD_OUT_FROM)
        expected = reference.train(small.recipe, updates, held_out)
        if attempt == "with" or real.recipe.optimizer.clip is None:
            break
        # Every rank uses the limit of rank 0, because rounding could give a different limit on another machine.
        clip = collectives.all_reduce_sum(statistics.median(expected.norms) if rank.main else 0.0)
    return small, updates, held_out, expected


def _train_layout(
    engine: Engine, small: Resolved, updates: Sequence[Batch], held_out: Batch, rank: Rank, watch: Watch
) -> Curve:
    """Train the shrunk model on the layout with the same batches as the reference, and return the curve."""
    from megagpt.parity.curve import Curve

    # The weights are cloned, because at ZeRO stage 0 the engine returns the live tensors.
    initial = {name: value.clone() for name, value in engine.weights()}
    before = _evaluate(engine, _rank_batches(held_out, small, rank))
    results = []
    for number, batch in enumerate(updates, start=1):
        watch.enter(PASSES, number)
        results.append(_train_update(engine, _rank_batches(batch, small, rank)))
    watch.enter(EVALUATE, len(updates))
    after = _evaluate(engine, _rank_batches(held_out, small, rank))
    final = {name: value.clone() for name, value in engine.weights()}
    rows = ([row.loss, row.grad_norm, row.lr, row.tokens] for row in results)
    losses, norms, rates, tokens = (list(column) for column in zip(*rows, strict=True))
    return Curve(losses, norms, rates, [int(number) for number in tokens], [before, after], initial, final)


def _evaluate(engine: Engine, batches: Sequence[Batch]) -> float:
    loss = engine.evaluate(batches)
    assert loss is not None  # It is None only if an evaluation is stopped early.
    return loss


def _train_update(engine: Engine, batches: Sequence[Batch]) -> UpdateResult:
    """Make one update. If a gradient overflows in fp16, repeat the update with a lower loss scale, as a run does."""
    result = engine.train_update(batches)
    while not result.made and math.isfinite(result.loss) and result.scale and result.scale.value > result.scale.minimum:
        result = engine.train_update(batches)
    return result


def _rank_batches(batch: Batch, small: Resolved, rank: Rank) -> list[Batch]:
    """Return this rank's micro-batches of a global batch, in the same order as `Loader`."""
    layout = small.layout
    first, step = layout.data_rank(rank.rank) * layout.micro_batch, layout.micro_batch * layout.data_parallel
    starts = range(first, len(batch.labels), step)
    return [type(batch)(*(tensor[start : start + layout.micro_batch] for tensor in batch)) for start in starts]
