"""A run's parts, put together once: recipe and DeepSpeed config, data, engine, checkpoint, console."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt import files
from megagpt.checkpoint import resume
from megagpt.checkpoint import store as checkpoint
from megagpt.checkpoint.async_saver import Saver
from megagpt.cluster import Agreement, Rank, env_forwarding, preflight
from megagpt.config import deepspeed as ds_config
from megagpt.config import recipe as recipes
from megagpt.corpus.reader import CorpusReader
from megagpt.data import blend
from megagpt.data.evaluation_batches import EvaluationBatches
from megagpt.data.loader import Loader
from megagpt.model import flops
from megagpt.state import TrainState
from megagpt.training import time_breakdown
from megagpt.training.anomalies import MOST_FAILED_SAVES, Health, Row
from megagpt.training.console import Console, Progress
from megagpt.training.metrics import Metrics
from megagpt.training.status import DONE
from megagpt.training.stop_signals import REQUEST, Stopping
from megagpt.training.watchdog import Watch

if TYPE_CHECKING:
    from megagpt.config.deepspeed import Resolved
    from megagpt.engine.base import Engine


@dataclass(frozen=True)
class Options:
    """What the command line says; see `megagpt train --help`."""

    recipe: Path
    deepspeed_config: Path
    overrides: tuple[str, ...] = ()
    resume: str = "auto"
    expect_world_size: int | None = None
    max_minutes: float | None = None
    allow_change: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """The parts of a run on this rank, put together once."""

    path: Path
    rank: Rank
    resolved: Resolved
    total: int
    loader: Loader
    validation: tuple[EvaluationBatches, ...]
    engine: Engine
    agreement: Agreement
    store: checkpoint.Store
    saver: Saver
    console: Console
    metrics: Metrics
    failed_saves: Row
    health: Health
    watch: Watch
    progress: Progress
    stopping: Stopping
    flops_per_token: float
    peak_flops: float | None  # of all devices together; None where it is not known
    peak_memory: Callable[[], int | None]  # of this rank's device so far, in bytes; None on a CPU


def assemble(
    options: Options, rank: Rank, recipe: recipes.Recipe, console: Console, alarm: Callable[[str], None]
) -> tuple[Run, TrainState] | None:
    """Put the parts together and load the checkpoint; None where the run is done. `alarm` is told of a hang's end."""
    from megagpt.engine import build, deepspeed_keys, devices, init_deepspeed

    resolved = ds_config.load(
        options.deepspeed_config, recipe, rank.world_size, deepspeed_keys.known_keys(), options.overrides
    )
    recipe, path = resolved.recipe, Path(recipe.run_dir)
    loader, validation = _data(resolved, rank)
    if recipe.data.document_mask:
        resolved = _with_document_end(resolved, loader)
        recipe = resolved.recipe
    total = recipes.total_updates(recipe, loader.sampler.samples_per_epoch)
    samples = total * recipe.batch.global_size
    taken = blend.source_usage(loader.sampler, recipe.data.train, samples)
    blend.check_max_epochs(taken, recipe.data.train, samples, recipe.batch.global_size, recipe.location)
    facts = _facts(resolved, loader)
    device = init_deepspeed.start(rank)
    agreement = Agreement(rank.world_size)
    hosts, unlike = _compare(options, rank, facts, agreement)
    store = checkpoint.Store(
        path, rank, agreement, recipe.checkpoint.keep_last, recipe.checkpoint.keep_every,
        needed=flops.checkpoint_bytes(recipe.model),
    )  # fmt: skip
    found, damaged = resume.find(store, options.resume)
    branched = found is None and recipe.init_from is not None
    if branched and recipe.init_from:
        place = f"{recipe.location('init_from')}  init_from: {recipe.init_from}"
        found = resume.branch(recipe.init_from, place, store, total)
    if found is not None:
        resume.check(found, facts, options.allow_change, branched)
        if found.state.update >= total and all(agreement.any(rank.main and done(path) >= found.state.update)):
            console.say(
                f"{path} is done: {found.state.update:,} of {total:,} updates. A longer length goes on from there."
            )
            return None

    engine = build.build(resolved, total, rank, agreement)
    state, notes = TrainState(), [*unlike, *(f"damaged, passed over: {line}" for line in damaged)]
    if found is not None:
        engine.load_state(found.folder)
        state = found.state
        moved = resume.moved(found, facts)
        notes += [f"changed: {line}" for line in resume.changes(found, facts)]
        notes += [f"moved to another layout: {moved}"] if moved else []
    peak = flops.peak_flops(device, recipe.precision or "fp32")
    metrics = Metrics(path, rank.main, state.update, recipe.health.window)
    health = Health(recipe.health)
    health.recall(metrics.decisive, agreement)
    run = Run(
        path, rank, resolved, total, loader, validation, engine, agreement, store,
        Saver(store, engine.save_state, facts, recipe.checkpoint.asynchronous), console, metrics,
        Row(MOST_FAILED_SAVES), health,
        Watch(path / "logs", rank.rank, hosts, recipe.log.hang_after, alarm, console.alarm),
        Progress(total, recipe.batch.global_size * recipe.model.seq_len),
        Stopping(options.max_minutes, agreement.any, *((path / REQUEST, console.alarm) if rank.main else ())),
        flops.flops_per_token(recipe.model), peak * rank.world_size if peak else None, devices.peak_memory,
    )  # fmt: skip
    _open(run, device, taken, notes, state, branched)
    return run, state


def _compare(
    options: Options, rank: Rank, facts: dict[str, Any], agreement: Agreement
) -> tuple[list[preflight.Host], list[str]]:
    """Where each rank is, and what is worth a note of how they differ; collective."""
    told = agreement.gather(
        preflight.facts_here(_same(facts), env_forwarding.passed_on(os.environ), preflight.ancestors())
    )
    return preflight.hosts_of(told), preflight.check_hosts(rank, told, os.environ, options.expect_world_size)


def done(run: Path) -> int:
    """The update at which a run was done; 0 while it is not."""
    try:
        return int(files.parse_json((run / DONE).read_text())["update"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def _data(resolved: Resolved, rank: Rank) -> tuple[Loader, tuple[EvaluationBatches, ...]]:
    """The training batches of this rank, and its share of the validation text."""
    from megagpt.engine import deepspeed_ops

    recipe, layout = resolved.recipe, resolved.layout
    shape: dict[str, Any] = {
        "seq_len": recipe.model.seq_len,
        "vocab_size": recipe.model.vocab_size,
        "tokenizer": recipe.data.tokenizer,
        "micro_batch": layout.micro_batch,
        "rank": layout.data_rank(rank.rank),
        "data_parallel": layout.data_parallel,
    }
    sources = [(source.path, source.weight) for source in recipe.data.train]
    loader = Loader(
        sources, seed=recipe.seed, accumulation=layout.accumulation, skip=recipe.data.skip,
        by_epochs=recipe.data.weight_counts == "epochs",
        pinned=deepspeed_ops.device() == "cuda", **shape,
    )  # fmt: skip
    samples = recipe.evaluation.samples
    held_out = [CorpusReader(path) for path in recipe.data.validation]
    for corpus in held_out:
        loader.refuse_validation_on(corpus)
    return loader, tuple(EvaluationBatches(corpus, samples=samples, **shape) for corpus in held_out)


def _with_document_end(resolved: Resolved, loader: Loader) -> Resolved:
    """The recipe with the token that ends a document, which the corpora say."""
    recipe = resolved.recipe
    data = recipe.data.model_copy(update={"eod": loader.document_end(recipe.data.eod)})
    return replace(resolved, recipe=recipe.model_copy(update={"data": data}))


def _facts(resolved: Resolved, loader: Loader) -> dict[str, Any]:
    """What a checkpoint says of its making, beside the state: enough to tell whether a resume is the same run."""
    return {
        "recipe": resolved.recipe.model_dump(mode="json"),
        "deepspeed": resolved.config,
        "layout": asdict(resolved.layout),
        "data": loader.fingerprint,
        "versions": {name: version(name) for name in ("megagpt", "deepspeed", "torch")},
    }


def _same(facts: dict[str, Any]) -> dict[str, str]:
    """What must be the same on every rank: of long things a checksum."""
    long = {"recipe": facts["recipe"], "DeepSpeed config": facts["deepspeed"], "data": facts["data"]}
    sums = {name: resume.fingerprint(value) for name, value in long.items()}
    return {**sums, "Python": platform.python_version(), **facts["versions"]}


def _open(
    run: Run, device: str, taken: list[blend.SourceUsage], notes: list[str], state: TrainState, branched: bool
) -> None:
    """Write down what is about to be trained, and say it in a few lines."""
    recipe, layout, order = run.resolved.recipe, run.resolved.layout, run.loader.sampler
    if run.rank.main:
        (run.path / DONE).unlink(missing_ok=True)  # of a shorter length, which this run goes on from
        files.replace_text(run.path / "recipe.yaml", recipes.to_yaml(recipe))
        files.replace_text(run.path / "deepspeed.json", json.dumps(run.resolved.config, indent=2) + "\n")
    per_update = recipe.batch.global_size * recipe.model.seq_len
    say = run.console.say
    say(f"run      {run.path}   (log: {run.console.log_path})")
    say(
        f"model    {recipe.model.n_layer} layers × {recipe.model.d_model}, "
        f"{flops.parameters(recipe.model):,} parameters, "
        f"{run.flops_per_token / 1e6:,.1f} MFLOP a token, {recipe.precision}"
    )
    held_out = (
        f"{sum(part.tokens for part in run.validation):,} tokens to validate on" if run.validation else "no validation"
    )
    say(
        f"data     {order.samples_per_epoch:,} samples of {recipe.model.seq_len} tokens an epoch; {held_out}; "
        f"fingerprint {resume.fingerprint(run.loader.fingerprint)}"
    )
    if len(taken) > 1:
        for head, line in zip(("blend", *[""] * len(taken)), blend.format_table(taken), strict=True):
            say(f"{head:<8} {line}")
    say(f"layout   {layout.world_size} × {device}, {layout.sharding}, {layout.batch_product} samples per update")
    share = run.total * recipe.batch.global_size / order.samples_per_epoch
    say(f"length   {run.total:,} updates of {per_update:,} tokens: {run.total * per_update:,} ({share:.2f} epochs)")
    if recipe.health.compare_every and layout.zero_stage == 3:
        notes = [*notes, "health.compare_every finds nothing to compare: at ZeRO stage 3 no two ranks hold the same"]
    for note in (*run.resolved.notes, *run.loader.notes, *notes):
        say(f"note     {note}")
    event, origin = "resume" if state.update else "start", {}
    if branched:
        event, origin = "branch", {"init_from": recipe.init_from}
        say(f"branched from {recipe.init_from}: this run has a schedule and a length of its own")
    if state.update:
        say(
            f"resumed  at update {state.update:,}, data position {state.position:,}: "
            "weights, optimizer, schedule, data, random state, metrics"
        )
    spent = {"seconds": time_breakdown.process_age(), "lost_seconds": run.metrics.lost_seconds}
    run.metrics.write(event, **asdict(state), **origin, **spent)
    run.progress.pause()
