"""The training loop (`megagpt train`). Start reading at `loop`."""

from __future__ import annotations

import os
import sys
import time
import traceback
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megagpt import files
from megagpt.checkpoint.async_saver import SaveFailed, SaveResult
from megagpt.checkpoint.store import read_manifest
from megagpt.cluster import Rank, from_environment, preflight
from megagpt.cluster.rendezvous import rendezvous
from megagpt.config import recipe as recipes
from megagpt.data.evaluation_batches import combine_losses, perplexity
from megagpt.data.loader import Batch
from megagpt.errors import EXIT_DONE, EXIT_FAILURE, EXIT_REQUEUE, EXIT_USER, MachineError, UserError
from megagpt.inference import generate
from megagpt.state import TrainState, UpdateResult
from megagpt.training import metrics, recovery
from megagpt.training.anomalies import Action, Anomaly
from megagpt.training.console import Console, display_only
from megagpt.training.setup import Run, TrainOptions, build_run
from megagpt.training.status import DONE, StatusFile
from megagpt.training.watchdog import DATA, EVALUATE, PASSES, SAMPLE, SAVE, STEP


def loop(run: Run, state: TrainState) -> int:
    """Train from `state` to the end of the recipe, or until a stop is requested. Returns the exit code."""
    recipe = run.resolved.recipe
    stop = run_missed_validation(run, state)
    while state.update < run.total and not stop:
        state = replace(state, position=run.health.next_position(state.position))
        result = train_step(run, state, next_batches(run, state))
        if anomaly := run.health.check(state.update, result):
            state = handle_bad_update(run, state, result, anomaly)
            continue
        state = state.advanced(run.loader.positions_used(state.position), result.tokens)
        record_update(run, state, result)
        if is_due(state, recipe.health.compare_every):
            recovery.compare_replicas(run, state)

        record_save(run, run.saver.advance())
        stop = run.stop_signals.agree()
        last = state.update == run.total
        if stop or last or is_due(state, recipe.checkpoint.every):
            save(run, state, last_chance=bool(stop) or last)
        if not stop and (last or is_due(state, recipe.evaluation.every)):
            stop = validate(run, state)
    return stop_run(run, state, stop) if stop else finish_run(run, state)


def is_due(state: TrainState, every: int | None) -> bool:
    """Return whether an action that is repeated every `every` updates is due now. None means never."""
    return every is not None and state.update % every == 0


def run_missed_validation(run: Run, state: TrainState) -> str | None:
    """Run the validation that was due at this update if the previous process exited before completing it.

    The time limit is ignored, so that a short limit cannot interrupt the validation on every start.

    Returns:
        The same as `validate`.

    Raises:
        UserError: if this validation has been interrupted on several consecutive starts.
    """
    was_due = state.update == run.total or is_due(state, run.resolved.recipe.evaluation.every)
    missed = was_due and state.update > 0 and bool(run.validation) and not run.metrics.events_at_resume["validation"]
    if not run.collectives.any(run.rank.main and missed):
        return None
    stop = validate(run, state, ignore_time_limit=True)
    if stop:
        recovery.refuse_repeated_interruption(run, state, stop)
    return stop


def next_batches(run: Run, state: TrainState) -> list[Batch]:
    """Return this rank's batches for the next update."""
    run.watch.enter(DATA, state.update + 1)
    start = time.perf_counter()
    batches = run.loader.batches(state.position)
    run.progress.data_seconds = time.perf_counter() - start
    return batches


def train_step(run: Run, state: TrainState, batches: list[Batch]) -> UpdateResult:
    """Run the next update. It is not applied if its loss is rejected or if its gradient is not finite."""
    update = state.update + 1
    run.watch.enter(PASSES, update)
    return run.engine.train_update(batches, run.health.accepts, lambda: run.watch.enter(STEP, update))


def record_update(run: Run, state: TrainState, result: UpdateResult) -> None:
    """Record an update in the metrics, and print a line about it if one is due."""
    seconds = run.progress.end_update()
    speed = result.tokens / seconds
    run.metrics.write(
        "update",
        update=state.update,
        loss=result.loss,
        lr=result.lr,
        grad_norm=result.grad_norm,
        tokens=state.tokens,
        position=state.position,
        tokens_per_second=speed,
        mfu=speed * run.flops_per_token / run.peak_flops if run.peak_flops else None,
        device_bytes=run.peak_memory(),
        seconds=seconds,
        data_seconds=run.progress.data_seconds,
    )
    run.health.observe("update", update=state.update, loss=result.loss, grad_norm=result.grad_norm)
    if state.update in (1, run.total) or is_due(state, run.resolved.recipe.log.every):
        with display_only():
            run.console.say(run.progress.line(state, result))


def save(run: Run, state: TrainState, last_chance: bool) -> None:
    """Save a checkpoint.

    Args:
        run: the run.
        state: the current state.
        last_chance: whether this is the last save of the process. If so, wait until it is finished, and raise
            SaveFailed if it failed.
    """
    run.watch.enter(SAVE, state.update)
    record_save(run, run.saver.finish())
    record_save(run, run.saver.save(state, wait=last_chance), last_chance)
    run.progress.exclude()


def record_save(run: Run, result: SaveResult | None, last_chance: bool = False) -> None:
    """Record the result of a save, if there is one. A failed save does not end training, except as described below.

    Args:
        run: the run.
        result: the result that the saver returned, or None if no save was finished.
        last_chance: whether this is the last save of the process.

    Raises:
        SaveFailed: if the save failed and there is no later save, or if too many consecutive saves have failed.
    """
    if result is None:
        return
    update = result.state.update
    seconds = {"stall_seconds": result.blocking_seconds, "write_seconds": result.write_seconds}
    if not result.published:
        run.metrics.write("save_failed", update=update, error=result.problem, **seconds)
        run.console.say(f"{'NOT SAVED':>11}  update {update}: {result.problem}")
        if run.failed_saves.add() or last_chance:
            raise SaveFailed(result.problem)
        return
    run.failed_saves.reset()
    run.health.observe("checkpoint", update=update)
    run.metrics.write("checkpoint", update=update, path=str(result.folder), **seconds)
    if result.problem:
        run.console.say(f"{'SAVED, BUT':>11}  update {update}: {result.problem}")


def handle_bad_update(run: Run, state: TrainState, result: UpdateResult, anomaly: Anomaly) -> TrainState:
    """Retry, skip or roll back a bad update, and return the state to continue from.

    A pending save is finished before a rollback, because the rollback may have to load that checkpoint.
    """
    if anomaly.action is Action.ROLL_BACK:
        run.watch.enter(SAVE, state.update)
        record_save(run, run.saver.finish())
    return recovery.handle_bad_update(run, state, result, anomaly)


def validate(run: Run, state: TrainState, ignore_time_limit: bool = False) -> str | None:
    """Measure the loss on the validation text, and print text that the model generates after the recipe's prompt.

    If a stop is requested in the meantime, the validation is abandoned, and the next start of the run repeats it.

    Args:
        run: the run.
        state: the current state.
        ignore_time_limit: whether only signals and the stop file can stop the validation.

    Returns:
        The reason for the stop if the validation was abandoned, or None if it was completed.
    """
    if not run.validation:
        return None

    def should_stop() -> bool:
        run.watch.enter(EVALUATE, state.update)  # entering a phase again counts as progress for the watchdog
        record_save(run, run.saver.advance())
        return run.stop_signals.agree(ignore_time_limit) is not None

    losses = []
    for part in run.validation:
        loss = run.engine.evaluate(part.batches(), should_stop)
        if loss is None:
            run.metrics.write("validation_left", update=state.update, seconds=run.progress.exclude())
            return run.stop_signals.reason
        losses.append((part, loss))
    total_loss, bits_per_byte = combine_losses(losses)
    by_source = {part.prefix: loss for part, loss in losses} if len(losses) > 1 else {}
    with display_only():
        show_validation(run, state, total_loss, bits_per_byte, by_source)
    show_sample(run, state)
    values: dict[str, Any] = {"loss": total_loss, "perplexity": perplexity(total_loss), "bits_per_byte": bits_per_byte}
    if by_source:
        values["sources"] = by_source
    run.metrics.write("validation", update=state.update, **values, seconds=run.progress.exclude())
    return None


def show_validation(
    run: Run, state: TrainState, loss: float, bits_per_byte: float | None, by_source: dict[str, float]
) -> None:
    """Print the total validation loss, and the loss per corpus if there are several."""
    bits = f"  {bits_per_byte:.4f} bits per byte" if bits_per_byte is not None else ""
    run.console.say(
        f"{'validation':>11}  update {state.update}  loss {loss:7.4f}  perplexity {perplexity(loss):.2f}{bits}"
    )
    for prefix, source_loss in by_source.items():
        run.console.say(f"{'':>11}  loss {source_loss:7.4f}  {prefix}")


def show_sample(run: Run, state: TrainState) -> None:
    """Print 40 tokens that the model generates after the recipe's prompt, if there is one. Collective."""
    prompt, tokenizer = run.resolved.recipe.evaluation.prompt, run.resolved.recipe.data.tokenizer
    if prompt is None or tokenizer is None:
        return
    run.watch.enter(SAMPLE, state.update)
    # `weights` is collective, so all ranks must iterate over it.
    weights = {name: value for name, value in run.engine.weights() if run.rank.main}
    if run.rank.main:
        text = generate.continue_line(weights, run.resolved.recipe.model, tokenizer, prompt)
        run.console.say(f"{'sample':>11}  {text}")
    # Ranks must wait for rank 0 in this phase. In the next phase, the watchdog would report them as hung.
    run.collectives.barrier()


def stop_run(run: Run, state: TrainState, reason: str) -> int:
    """Save a checkpoint if the current state is not saved yet, and print why training stops. Returns the exit code."""
    run.watch.enter(SAVE, state.update)
    record_save(run, run.saver.finish())
    saved = run.rank.main and read_manifest(run.store.folder(state.update))[0] is not None
    if not run.collectives.any(saved):
        save(run, state, last_chance=True)
    show_time_breakdown(run, state)
    run.console.say(f"Stopped by {reason}; checkpoint saved at update {state.update}. Run the same command to resume.")
    return EXIT_REQUEUE


def finish_run(run: Run, state: TrainState) -> int:
    """Verify the last checkpoint, and write the file DONE. Returns the exit code."""
    found, _ = run.store.newest_valid()
    if found is None or found.state != state:
        raise OSError(f"the last checkpoint, of update {state.update}, cannot be read back")
    show_time_breakdown(run, state)
    run.metrics.write("done", **asdict(state))
    if run.rank.main:
        files.replace_json(run.path / DONE, asdict(state))
    run.console.say(f"done: {state.update:,} updates, {state.tokens:,} tokens, in {run.path}")
    run.console.say(f"next: megagpt evaluate {run.path}")
    return EXIT_DONE


def show_time_breakdown(run: Run, state: TrainState) -> None:
    """Print and record the time breakdown of the run over all its processes."""
    if run.rank.main:
        breakdown = metrics.time_breakdown(run.path)
        run.metrics.write("time", update=state.update, **breakdown.record())
        with display_only():
            run.console.say(f"time     {breakdown}")


def train(options: TrainOptions) -> int:
    """Train a model, and return the exit code. Must be called on every rank."""
    rank = from_environment(os.environ)
    try:
        preflight.check_world_size(rank, options.expect_world_size, preflight.ancestors())
        recipe = recipes.load(options.recipe, options.overrides)
        with rendezvous(rank, str(Path(recipe.run_dir).absolute())) as met:
            return _train(options, met, recipe)
    except UserError as error:
        if rank.local_rank == 0 or isinstance(error, MachineError):
            raise
        return EXIT_USER  # all ranks of a host find the same mistake, and only one of them reports it


def _train(options: TrainOptions, rank: Rank, recipe: recipes.Recipe) -> int:
    run: Run | None = None
    with Console(Path(recipe.run_dir), rank.rank) as console:
        status = StatusFile(Path(recipe.run_dir), rank)
        status.start()

        def alarm(text: str) -> None:
            status.end(EXIT_FAILURE, text.removeprefix("megagpt: "))
            console.alarm(text)

        try:
            with ExitStack() as stack:
                built = build_run(options, rank, recipe, console, alarm, stack)
                if built is None:
                    status.end(EXIT_DONE)
                    return EXIT_DONE
                run, state = built
                code = loop(run, state)
                status.end(code, run.stop_signals.reason or "")
                # Some launchers, such as srun, end all ranks as soon as the first one exits with code 75.
                run.collectives.barrier()
            # The engine is not closed after a failure, because NCCL would wait for ranks that wait for this one.
            run.engine.close()
            return code
        except UserError as error:
            status.end(error.exit_code, str(error))
            raise
        except Exception as error:
            traceback.print_exc()
            _report_failure(error, run, rank, console, status)
            os._exit(EXIT_FAILURE)  # skips exit handlers, which would wait for ranks that wait for this one


def _report_failure(error: Exception, run: Run | None, rank: Rank, console: Console, status: StatusFile) -> None:
    """Report where training failed, and which ranks have died. A rank that was killed cannot report this itself."""
    doing = run.watch.doing if run else "the start"
    cause = f"in {doing}: {type(error).__name__}: {error}{recovery.advice(error)}"
    status.end(EXIT_FAILURE, cause)
    console.alarm(f"megagpt: rank {rank.rank} failed {cause}\n  log: {console.log_path}")
    with display_only():
        sys.stdout.flush()
    if run is None or rank.world_size == 1 or not isinstance(error, RuntimeError):  # gloo and NCCL raise RuntimeError
        return
    if gone := run.watch.gone():
        console.alarm("\n".join([f"megagpt: rank {rank.rank} failed without", *gone]))
        status.end(EXIT_FAILURE, "\n".join([cause, *gone]))
