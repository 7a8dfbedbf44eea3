"""Set up a training run: build its parts from recipe and DeepSpeed config, and load the checkpoint to resume from."""

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

from megagpt import ds_config, files
from megagpt import recipe as recipes
from megagpt.data import blend
from megagpt.data.evaluation import EvaluationBatches
from megagpt.data.indexed import CorpusReader
from megagpt.data.loader import Loader
from megagpt.distributed import Collectives, Rank, passing, promise
from megagpt.model import cost
from megagpt.run import checkpoint, resume, times
from megagpt.run.console import Console, Progress, display_only
from megagpt.run.health import MAX_FAILED_SAVES, ConsecutiveFailures, Health
from megagpt.run.metrics import Metrics
from megagpt.run.saving import Saver
from megagpt.run.status import DONE, STOP_FILE
from megagpt.run.stopping import StopSignals
from megagpt.run.watch import Watch
from megagpt.state import TrainState

if TYPE_CHECKING:
    from megagpt.ds_config import Resolved
    from megagpt.engine.base import Engine

_FP32_ADAM_BYTES = 12  # per parameter: a weight and two moments in fp32


@dataclass(frozen=True)
class TrainOptions:
    """Options of `megagpt train`; see `megagpt train --help`."""

    recipe: Path
    deepspeed_config: Path
    overrides: tuple[str, ...] = ()
    resume: str = "auto"
    expect_world_size: int | None = None
    max_minutes: float | None = None
    allow_change: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """The parts of a training run on this rank."""

    path: Path
    rank: Rank
    resolved: Resolved
    total: int
    """Number of updates at the end of the run."""
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
    """FLOP/s of all devices together; None if unknown."""
    peak_memory: Callable[[], int | None]
    """Returns the most memory that this rank's device has used so far, in bytes; None on a CPU."""


@dataclass(frozen=True)
class _Start:
    """How a run starts: its state, the event in metrics.jsonl, and the notes to show."""

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
    """Build the parts of a run, and load the checkpoint that it resumes from. Collective.

    Args:
        options: options of the command.
        rank: this rank.
        recipe: the recipe, with overrides applied.
        console: an open console.
        alarm: called with a message before the watchdog ends the process because of a hang.
        stack: closes what this opens: signal handlers, threads and files.

    Returns:
        The run and the state to train from, or None if the run is already complete.

    Raises:
        UserError: Recipe, config, data, or the run directory do not fit together.
    """
    from megagpt.engine import build, devices, keys, start

    resolved = ds_config.load(options.deepspeed_config, recipe, rank.world_size, keys.known_keys(), options.overrides)
    path = Path(recipe.run_dir)
    loader, validation = _data(resolved, rank)
    if resolved.recipe.data.document_mask:
        resolved = _with_document_end(resolved, loader)
    recipe = resolved.recipe
    total = recipes.updates(recipe, loader.sampler.samples_per_epoch)
    usage = _source_usage(recipe, loader, total)
    facts = _facts(resolved, loader)
    device = start.start(rank)
    collectives = Collectives(rank.world_size)
    hosts, notes = _compare_ranks(options, rank, facts, collectives)
    store = checkpoint.Store(
        path,
        rank,
        collectives,
        keep_last=recipe.checkpoint.keep_last,
        keep_every=recipe.checkpoint.keep_every,
        min_bytes=_FP32_ADAM_BYTES * cost.parameters(recipe.model),
    )
    found, branched, damaged = _find_checkpoint(options, recipe, store, facts, total)
    if found is not None and found.state.update >= total:
        recorded = rank.main and update_of_done(path) >= found.state.update
        if collectives.any(recorded):
            updates = f"{found.state.update:,} of {total:,} updates"
            console.say(f"Run already complete ({updates}). To continue, increase `length`.")
            return None

    engine = build.build(resolved, total, rank, collectives)
    if found is not None:
        engine.load_state(found.folder)
    begin = _how_it_starts(
        found, branched, facts, [*notes, *(f"skipped damaged checkpoint {line}" for line in damaged)]
    )
    metrics = Metrics(path, rank.main, recipe.health.window)
    stack.callback(metrics.close)
    lost_seconds = metrics.truncate(begin.state.update)
    health = Health(recipe.health)
    health.replay(metrics.replayable, collectives)
    saver = Saver(store, engine.save_state, facts, recipe.checkpoint.asynchronous)
    stack.callback(saver.close)
    stop_signals = StopSignals(
        options.max_minutes,
        collectives.any,
        stop_file=path / STOP_FILE if rank.main else None,
        notify=console.alarm if rank.main else None,
    )
    peak = cost.peak_flops(device, recipe.precision or "fp32")
    run = Run(
        path=path,
        rank=rank,
        resolved=resolved,
        total=total,
        loader=loader,
        validation=validation,
        engine=engine,
        collectives=collectives,
        store=store,
        saver=saver,
        console=console,
        metrics=metrics,
        failed_saves=ConsecutiveFailures(MAX_FAILED_SAVES),
        health=health,
        watch=Watch(path / "logs", rank.rank, hosts, recipe.log.hang_after, alarm, console.alarm),
        progress=Progress(total, recipe.batch.global_size * recipe.model.seq_len),
        stop_signals=stop_signals,
        flops_per_token=cost.flops_per_token(recipe.model),
        peak_flops=peak * rank.world_size if peak else None,
        peak_memory=devices.peak_memory,
    )
    stack.enter_context(run.stop_signals)
    stack.enter_context(run.watch)
    _write_configs(run)
    _show_start(run, device, usage, begin)
    _record_start(run, begin, lost_seconds)
    return run, begin.state


def update_of_done(run: Path) -> int:
    """Return the update at which the run was completed, or 0 if it is not complete."""
    try:
        return int(files.parse_json((run / DONE).read_text())["update"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def _source_usage(recipe: recipes.Recipe, loader: Loader, total: int) -> list[blend.SourceUsage]:
    """How much of each corpus the run reads. Raises UserError if it repeats one more often than the recipe allows."""
    samples = total * recipe.batch.global_size
    usage = blend.source_usage(loader.sampler, recipe.data.train, samples)
    blend.check_max_epochs(usage, recipe.data.train, samples, recipe.batch.global_size, recipe.place)
    return usage


def _compare_ranks(
    options: TrainOptions, rank: Rank, facts: dict[str, Any], collectives: Collectives
) -> tuple[list[promise.Host], list[str]]:
    """Compare the ranks' hosts, recipes and versions. Returns the host of each rank, and notes on differences."""
    mine = promise.facts_here(_must_be_same(facts), passing.passed_on(os.environ), promise.ancestors())
    everyone = collectives.all_gather_object(mine)
    return promise.hosts_of(everyone), promise.check_hosts(rank, everyone, os.environ, options.expect_world_size)


def _find_checkpoint(
    options: TrainOptions, recipe: recipes.Recipe, store: checkpoint.Store, facts: dict[str, Any], total: int
) -> tuple[checkpoint.Checkpoint | None, bool, list[str]]:
    """Return the checkpoint to start from, whether it is another run's, and a line per damaged one."""
    found, damaged = resume.find_checkpoint(store, options.resume)
    branched = found is None and recipe.init_from is not None
    if branched and recipe.init_from:
        where = f"{recipe.place('init_from')}  init_from: {recipe.init_from}"
        found = resume.find_branch_point(recipe.init_from, where, store, total)
    if found is not None:
        resume.check_unchanged(found, facts, options.allow_change, branched)
    return found, branched, damaged


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
    """Return this rank's training batches, and its part of the validation batches."""
    from megagpt.engine import operators

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
        pinned=operators.device() == "cuda",
        **shape,
    )
    samples = recipe.evaluation.samples
    return loader, tuple(
        EvaluationBatches(CorpusReader(path), samples=samples, **shape) for path in recipe.data.validation
    )


def _with_document_end(resolved: Resolved, loader: Loader) -> Resolved:
    """Return the recipe with the end-of-document token, which the corpora record."""
    recipe = resolved.recipe
    data = recipe.data.model_copy(update={"eod": loader.document_end(recipe.data.eod)})
    return replace(resolved, recipe=recipe.model_copy(update={"data": data}))


def _facts(resolved: Resolved, loader: Loader) -> dict[str, Any]:
    """What a checkpoint records besides the state: enough to tell whether a resume is the same run."""
    return {
        "recipe": resolved.recipe.model_dump(mode="json"),
        "deepspeed": resolved.config,
        "layout": asdict(resolved.layout),
        "data": loader.fingerprint,
        "versions": {name: version(name) for name in ("megagpt", "deepspeed", "torch")},
    }


def _must_be_same(facts: dict[str, Any]) -> dict[str, str]:
    """What must be the same on every rank; long values as checksums."""
    long = {"recipe": facts["recipe"], "DeepSpeed config": facts["deepspeed"], "data": facts["data"]}
    checksums = {name: resume.fingerprint(value) for name, value in long.items()}
    return {**checksums, "Python": platform.python_version(), **facts["versions"]}


def _write_configs(run: Run) -> None:
    """Write the resolved recipe and DeepSpeed config into the run directory."""
    if not run.rank.main:
        return
    (run.path / DONE).unlink(missing_ok=True)  # of a shorter length, which this run continues
    files.replace_text(run.path / "recipe.yaml", recipes.to_yaml(run.resolved.recipe))
    files.replace_text(run.path / "deepspeed.json", json.dumps(run.resolved.config, indent=2) + "\n")


def _record_start(run: Run, begin: _Start, lost_seconds: float) -> None:
    source = {"init_from": run.resolved.recipe.init_from} if begin.event == "branch" else {}
    seconds = {"seconds": times.process_age(), "lost_seconds": lost_seconds}
    run.metrics.write(begin.event, **asdict(begin.state), **source, **seconds)
    run.progress.exclude()


def _show_start(run: Run, device: str, usage: list[blend.SourceUsage], begin: _Start) -> None:
    """Show what is about to be trained in a few lines."""
    say = run.console.say
    with display_only():
        for line in _describe(run, device):
            say(line)
        if len(usage) > 1:
            for number, line in enumerate(blend.format_table(usage)):
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
    """Describe run directory, model, data, layout and length, one line each."""
    recipe, layout = run.resolved.recipe, run.resolved.layout
    model = recipe.model
    samples_per_epoch = run.loader.sampler.samples_per_epoch
    validation = "no validation"
    if run.validation:
        validation = f"{sum(part.tokens for part in run.validation):,} validation tokens"
    degrees = {
        "pipeline stages": layout.pipeline_stages,
        "tensor parallel": layout.tensor_parallel,
        "sequence parallel": layout.sequence_parallel,
    }
    model_parallel = "".join(f"{name} {degree}, " for name, degree in degrees.items() if degree > 1)
    tokens_per_update = recipe.batch.global_size * model.seq_len
    epochs = run.total * recipe.batch.global_size / samples_per_epoch
    return [
        f"run      {run.path}   (log: {run.console.log_path})",
        f"model    {model.n_layer} layers × {model.d_model}, {cost.parameters(model):,} parameters, "
        f"{run.flops_per_token / 1e6:,.1f} MFLOP per token, {recipe.precision}",
        f"data     {samples_per_epoch:,} samples of {model.seq_len} tokens per epoch; {validation}; "
        f"fingerprint {resume.fingerprint(run.loader.fingerprint)}",
        f"layout   {layout.world_size} × {device}, {model_parallel}ZeRO stage {layout.zero_stage}, "
        f"data parallel {layout.data_parallel} × micro-batch {layout.micro_batch} × accumulation {layout.accumulation} "
        f"= {recipe.batch.global_size} samples per update",
        f"length   {run.total:,} updates of {tokens_per_update:,} tokens: "
        f"{run.total * tokens_per_update:,} tokens ({epochs:.2f} epochs)",
    ]
