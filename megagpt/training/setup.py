"""Set up a training run from its recipe and DeepSpeed config, and load the checkpoint from which it resumes."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt import files
from megagpt.checkpoint import resume
from megagpt.checkpoint import store as checkpoint
from megagpt.checkpoint.async_saver import Saver
from megagpt.cluster import Collectives, Rank, env_forwarding, preflight
from megagpt.config import deepspeed as ds_config
from megagpt.config import recipe as recipes
from megagpt.corpus.reader import CorpusReader
from megagpt.data import blend
from megagpt.data.evaluation_batches import EvaluationBatches
from megagpt.data.loader import Loader
from megagpt.model import flops
from megagpt.state import TrainState
from megagpt.training import time_breakdown
from megagpt.training.anomalies import MAX_FAILED_SAVES, ConsecutiveFailures, Health
from megagpt.training.console import Console, Progress, display_only
from megagpt.training.metrics import Metrics
from megagpt.training.status import DONE, STOP_FILE
from megagpt.training.stop_signals import StopSignals
from megagpt.training.watchdog import Watch

if TYPE_CHECKING:
    from megagpt.config.deepspeed import Resolved
    from megagpt.engine.base import Engine


@dataclass(frozen=True)
class TrainOptions:
    """Command-line options of `megagpt train`, which `megagpt train --help` describes."""

    recipe: Path
    deepspeed_config: Path
    overrides: tuple[str, ...] = ()
    resume: str = "auto"
    expect_world_size: int | None = None
    max_minutes: float | None = None
    allow_change: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """All components of a training run on this rank."""

    path: Path
    rank: Rank
    resolved: Resolved
    total: int
    """Number of updates of the whole run."""
    loader: Loader
    validation: tuple[EvaluationBatches, ...]
    engine: Engine
    collectives: Collectives
    store: checkpoint.Store
    saver: Saver
    console: Console
    metrics: Metrics
    failed_saves: ConsecutiveFailures
    health: Health
    watch: Watch
    progress: Progress
    stop_signals: StopSignals
    flops_per_token: float
    peak_flops: float | None
    """Sum of the peak FLOP/s of all devices, or None if unknown."""
    peak_memory: Callable[[], int | None]
    """Function that returns the peak memory of this rank's device so far in bytes, or None on a CPU."""


@dataclass(frozen=True)
class _Inputs:
    """Inputs from which a run is built. `facts` holds the values that its checkpoints record besides the state."""

    rank: Rank
    resolved: Resolved
    total: int
    loader: Loader
    validation: tuple[EvaluationBatches, ...]
    usage: list[blend.SourceUsage]
    facts: dict[str, Any]
    device: str
    collectives: Collectives


@dataclass(frozen=True)
class _Start:
    """Start of a run, with its initial state, the event for metrics.jsonl, and the notes to print."""

    state: TrainState
    event: str
    notes: list[str]


def build_run(
    options: TrainOptions,
    rank: Rank,
    recipe: recipes.Recipe,
    console: Console,
    alarm: Callable[[str], None],
    stack: ExitStack,
) -> tuple[Run, TrainState] | None:
    """Build the components of a run, and load the checkpoint from which it resumes. Collective.

    Args:
        options: the command-line options.
        rank: this rank.
        recipe: the recipe, with overrides applied.
        console: an open console.
        alarm: function that is called with a message before the watchdog ends the process because of a hang.
        stack: exit stack that closes the files, threads and signal handlers of the run.

    Returns:
        The run and the state to continue from, or None if the run is already complete.

    Raises:
        UserError: if the recipe, the config, the data or the run directory is invalid or does not fit the others.
    """
    from megagpt.engine import build

    inputs = _load_inputs(options, rank, recipe)
    recipe, path = inputs.resolved.recipe, Path(recipe.run_dir)
    hosts, notes = _compare_ranks(options, inputs)
    store = checkpoint.Store(
        path,
        rank,
        inputs.collectives,
        keep_last=recipe.checkpoint.keep_last,
        keep_every=recipe.checkpoint.keep_every,
        min_bytes=flops.checkpoint_bytes(recipe.model),
    )
    found, branched, damaged = _find_checkpoint(options, inputs, store)
    if found is not None and _is_complete(inputs, found):
        updates = f"{found.state.update:,} of {inputs.total:,} updates"
        console.say(f"Run already complete ({updates}). To continue, increase `length`.")
        return None
    engine = build.build(inputs.resolved, inputs.total, rank, inputs.collectives)
    if found is not None:
        engine.load_state(found.folder)
    notes += [f"skipped damaged checkpoint {line}" for line in damaged]
    begin = _how_it_starts(found, branched, inputs.facts, notes)
    metrics = Metrics(path, rank.main, recipe.health.window)
    stack.callback(metrics.close)
    lost_seconds = metrics.truncate(begin.state.update)
    watch = Watch(path / "logs", rank.rank, hosts, recipe.log.hang_after, alarm, console.alarm)
    run = _put_together(options, inputs, store, engine, console, metrics, watch)
    stack.callback(run.saver.close)
    stack.enter_context(run.stop_signals)
    stack.enter_context(run.watch)
    _write_configs(run)
    _show_start(run, inputs, begin)
    _record_start(run, begin, lost_seconds)
    return run, begin.state


def _put_together(
    options: TrainOptions,
    inputs: _Inputs,
    store: checkpoint.Store,
    engine: Engine,
    console: Console,
    metrics: Metrics,
    watch: Watch,
) -> Run:
    """Build the remaining components and return the run. No file is opened and no thread is started."""
    from megagpt.engine import devices

    recipe, rank = inputs.resolved.recipe, inputs.rank
    health = Health(recipe.health)
    health.replay(metrics.replayable, inputs.collectives)
    peak = flops.peak_flops(inputs.device, recipe.precision or "fp32")
    return Run(
        path=store.run,
        rank=rank,
        resolved=inputs.resolved,
        total=inputs.total,
        loader=inputs.loader,
        validation=inputs.validation,
        engine=engine,
        collectives=inputs.collectives,
        store=store,
        saver=Saver(store, engine.save_state, inputs.facts, recipe.checkpoint.asynchronous),
        console=console,
        metrics=metrics,
        failed_saves=ConsecutiveFailures(MAX_FAILED_SAVES),
        health=health,
        watch=watch,
        progress=Progress(inputs.total, recipe.batch.global_size * recipe.model.seq_len),
        stop_signals=StopSignals(
            options.max_minutes,
            inputs.collectives.any,
            stop_file=store.run / STOP_FILE if rank.main else None,
            notify=console.alarm if rank.main else None,
        ),
        flops_per_token=flops.flops_per_token(recipe.model),
        peak_flops=peak * rank.world_size if peak else None,
        peak_memory=devices.peak_memory,
    )


def _load_inputs(options: TrainOptions, rank: Rank, recipe: recipes.Recipe) -> _Inputs:
    """Resolve the recipe and the config, open the data, and join the process group."""
    from megagpt.engine import deepspeed_keys, init_deepspeed

    resolved = ds_config.load(
        options.deepspeed_config, recipe, rank.world_size, deepspeed_keys.known_keys(), options.overrides
    )
    loader, validation = _data(resolved, rank)
    if resolved.recipe.data.document_mask:
        resolved = _with_document_end(resolved, loader)
    total = recipes.total_updates(resolved.recipe, loader.sampler.samples_per_epoch)
    usage = _source_usage(resolved.recipe, loader, total)
    facts = _facts(resolved, loader)
    device = init_deepspeed.start(rank)
    return _Inputs(rank, resolved, total, loader, validation, usage, facts, device, Collectives(rank.world_size))


def update_of_done(run: Path) -> int:
    """Return the update at which the run was completed, or 0 if the run is not complete."""
    try:
        return int(files.parse_json((run / DONE).read_text())["update"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def _source_usage(recipe: recipes.Recipe, loader: Loader, total: int) -> list[blend.SourceUsage]:
    """Return how much of each corpus the run uses.

    Raises UserError if the run repeats a corpus more often than the recipe allows.
    """
    samples = total * recipe.batch.global_size
    usage = blend.source_usage(loader.sampler, recipe.data.train, samples)
    blend.check_max_epochs(usage, recipe.data.train, samples, recipe.batch.global_size, recipe.location)
    return usage


def _compare_ranks(options: TrainOptions, inputs: _Inputs) -> tuple[list[preflight.RankLocation], list[str]]:
    """Compare the hosts, recipes and versions of all ranks. Returns the host of each rank, and notes on differences."""
    mine = preflight.describe_rank(
        _must_be_same(inputs.facts), env_forwarding.forwarded_variables(os.environ), preflight.ancestors()
    )
    everyone = inputs.collectives.all_gather_object(mine)
    notes = preflight.check_hosts(inputs.rank, everyone, os.environ, options.expect_world_size)
    return preflight.locations_of_ranks(everyone), notes


def _find_checkpoint(
    options: TrainOptions, inputs: _Inputs, store: checkpoint.Store
) -> tuple[checkpoint.Checkpoint | None, bool, list[str]]:
    """Return the checkpoint to start from, whether it belongs to another run, and a line per damaged checkpoint."""
    recipe = inputs.resolved.recipe
    found, damaged = resume.find_checkpoint(store, options.resume)
    branched = found is None and recipe.init_from is not None
    if branched and recipe.init_from:
        where = f"{recipe.location('init_from')}  init_from: {recipe.init_from}"
        found = resume.find_branch_point(recipe.init_from, where, store, inputs.total)
    if found is not None:
        resume.check_unchanged(found, inputs.facts, options.allow_change, branched)
    return found, branched, damaged


def _is_complete(inputs: _Inputs, found: checkpoint.Checkpoint) -> bool:
    """Return whether the run has reached its length and has a DONE file that confirms it. Collective."""
    if found.state.update < inputs.total:
        return False
    done = inputs.rank.main and update_of_done(Path(inputs.resolved.recipe.run_dir)) >= found.state.update
    return inputs.collectives.any(done)


def _how_it_starts(
    found: checkpoint.Checkpoint | None, branched: bool, facts: dict[str, Any], notes: list[str]
) -> _Start:
    if found is None:
        return _Start(TrainState(), "start", notes)
    notes = [*notes, *(f"changed: {line}" for line in resume.recipe_changes(found, facts))]
    if layout_changes := resume.layout_changes(found, facts):
        notes.append(f"layout changed: {layout_changes}")
    event = "branch" if branched else "resume" if found.state.update else "start"
    return _Start(found.state, event, notes)


def _data(resolved: Resolved, rank: Rank) -> tuple[Loader, tuple[EvaluationBatches, ...]]:
    """Return the loader of this rank's training batches, and this rank's validation batches per corpus."""
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
    loader = Loader(
        [(source.path, source.weight) for source in recipe.data.train],
        seed=recipe.seed,
        accumulation=layout.accumulation,
        skip=recipe.data.skip,
        by_epochs=recipe.data.weight_counts == "epochs",
        pinned=deepspeed_ops.device() == "cuda",
        **shape,
    )
    samples = recipe.evaluation.samples
    held_out = [CorpusReader(path) for path in recipe.data.validation]
    for corpus in held_out:
        loader.refuse_validation_on(corpus)
    return loader, tuple(EvaluationBatches(corpus, samples=samples, **shape) for corpus in held_out)


def _with_document_end(resolved: Resolved, loader: Loader) -> Resolved:
    """Return the resolved config with `data.eod` set to the id of the end-of-document token of the corpora."""
    recipe = resolved.recipe
    data = recipe.data.model_copy(update={"eod": loader.document_end(recipe.data.eod)})
    return replace(resolved, recipe=recipe.model_copy(update={"data": data}))


def _facts(resolved: Resolved, loader: Loader) -> dict[str, Any]:
    """Return the values that a checkpoint records besides the state, by which a resumed run is compared with it."""
    return {
        "recipe": resolved.recipe.model_dump(mode="json"),
        "deepspeed": resolved.config,
        "layout": asdict(resolved.layout),
        "data": loader.fingerprint,
        "versions": {name: version(name) for name in ("megagpt", "deepspeed", "torch")},
    }


def _must_be_same(facts: dict[str, Any]) -> dict[str, str]:
    """Return values that must be the same on every rank. Long values are replaced by checksums."""
    long = {"recipe": facts["recipe"], "DeepSpeed config": facts["deepspeed"], "data": facts["data"]}
    checksums = {name: resume.fingerprint(value) for name, value in long.items()}
    return {**checksums, "Python": platform.python_version(), **facts["versions"]}


def _write_configs(run: Run) -> None:
    """Write the resolved recipe and DeepSpeed config into the run directory."""
    if not run.rank.main:
        return
    (run.path / DONE).unlink(missing_ok=True)  # the run may have been complete before its length was increased
    files.replace_text(run.path / "recipe.yaml", recipes.to_yaml(run.resolved.recipe))
    files.replace_text(run.path / "deepspeed.json", json.dumps(run.resolved.config, indent=2) + "\n")


def _record_start(run: Run, begin: _Start, lost_seconds: float) -> None:
    source = {"init_from": run.resolved.recipe.init_from} if begin.event == "branch" else {}
    seconds = {"seconds": time_breakdown.process_age(), "lost_seconds": lost_seconds}
    run.metrics.write(begin.event, **asdict(begin.state), **source, **seconds)
    run.progress.exclude()


def _show_start(run: Run, inputs: _Inputs, begin: _Start) -> None:
    """Print a few lines that describe the run."""
    say = run.console.say
    with display_only():
        for line in _describe(run, inputs.device):
            say(line)
        if len(inputs.usage) > 1:
            for number, line in enumerate(blend.format_table(inputs.usage)):
                say(f"{'' if number else 'blend':<8} {line}")
    recipe = run.resolved.recipe
    notes = [*run.resolved.notes, *run.loader.notes, *begin.notes]
    if recipe.health.compare_every and run.resolved.layout.zero_stage == 3:
        notes.append("health.compare_every compares nothing: at ZeRO stage 3 no two ranks hold the same weights")
    for note in notes:
        say(f"note     {note}")
    state = begin.state
    if begin.event == "branch":
        say(f"branched from {recipe.init_from}: this run has its own schedule and length")
    if state.update:
        say(
            f"resumed  at update {state.update:,}, data position {state.position:,}: "
            "weights, optimizer, schedule, data, random state, metrics"
        )


def _describe(run: Run, device: str) -> list[str]:
    """Return the lines that describe the run directory, model, data, layout and length."""
    recipe, layout = run.resolved.recipe, run.resolved.layout
    model = recipe.model
    samples_per_epoch = run.loader.sampler.samples_per_epoch
    validation = "no validation"
    if run.validation:
        validation = f"{sum(part.tokens for part in run.validation):,} validation tokens"
    tokens_per_update = recipe.batch.global_size * model.seq_len
    epochs = run.total * recipe.batch.global_size / samples_per_epoch
    return [
        f"run      {run.path}   (log: {run.console.log_path})",
        f"model    {model.n_layer} layers × {model.d_model}, {flops.parameters(model):,} parameters, "
        f"{run.flops_per_token / 1e6:,.1f} MFLOP per token, {recipe.precision}",
        f"data     {samples_per_epoch:,} samples of {model.seq_len} tokens per epoch; {validation}; "
        f"fingerprint {resume.fingerprint(run.loader.fingerprint)}",
        f"layout   {layout.world_size} × {device}, {layout.sharding}, {layout.batch_product} samples per update",
        f"length   {run.total:,} updates of {tokens_per_update:,} tokens: "
        f"{run.total * tokens_per_update:,} tokens ({epochs:.2f} epochs)",
    ]
