"""`megagpt train`: build, resume, and the loop. Start reading at `loop`."""

from __future__ import annotations

import math
import os
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megagpt import files
from megagpt.checkpoint.async_saver import Attempt
from megagpt.checkpoint.store import SaveFailed, read
from megagpt.cluster import Rank, from_environment, preflight
from megagpt.cluster.rendezvous import rendezvous
from megagpt.config import recipe as recipes
from megagpt.data.evaluation_batches import combine_losses
from megagpt.data.loader import Batch
from megagpt.errors import EXIT_DONE, EXIT_FAILURE, EXIT_REQUEUE, EXIT_USER, MachineError, UserError
from megagpt.inference import generate
from megagpt.state import TrainState, UpdateResult, Verdict
from megagpt.training import metrics, recovery
from megagpt.training.anomalies import Finding, Remedy
from megagpt.training.console import Console
from megagpt.training.setup import Options, Run, assemble
from megagpt.training.status import DONE, Note
from megagpt.training.stop_signals import Asking
from megagpt.training.watchdog import DATA, EVALUATE, PASSES, SAMPLE, SAVE, STEP


def loop(run: Run, state: TrainState) -> int:
    """Train from `state` to the end of the recipe, or until asked to stop; the exit code."""
    recipe = run.resolved.recipe
    stop = make_up(run, state)
    while state.update < run.total and not stop:
        state = replace(state, position=run.health.start(state.position))
        result = make(run, state, fetch(run, state))
        if found := run.health.judge(state.update, result):
            state = set_back(run, state, result, found)
            continue
        state = state.advanced(run.loader.positions_used(state.position), result.tokens)
        record(run, state, result)
        if due(state, recipe.health.compare_every):
            recovery.compare_replicas(run, state)

        stop, last = agree(run).stop, state.update == run.total
        if stop or last or due(state, recipe.checkpoint.every):
            save(run, state, last_chance=bool(stop) or last)
        if not stop and (last or due(state, recipe.evaluation.every)):
            stop = validate(run, state)
    return leave(run, state, stop) if stop else finish(run, state)


def due(state: TrainState, every: int | None) -> bool:
    """Whether something that is done every so many updates is due now."""
    return every is not None and state.update % every == 0


def make_up(run: Run, state: TrainState) -> str | None:
    """Make the validation of this update if it is due and not on record: the process before ended before it.

    Answers as `validate`. No time limit ends it, or one could at every start; raises UserError where signals do.
    """
    here, is_due = run.metrics.here, state.update == run.total or due(state, run.resolved.recipe.evaluation.every)
    owed = run.rank.main and is_due and state.update > 0 and bool(run.validation) and not here["validation"]
    stop = validate(run, state, limited=False) if all(run.agreement.any(owed)) else None
    if stop:
        recovery.refuse_vain_starts(run, state, stop)
    return stop


def fetch(run: Run, state: TrainState) -> list[Batch]:
    """This rank's batches of the next update."""
    run.watch.enter(DATA, state.update + 1)
    begun = time.perf_counter()
    batches = run.loader.batches(state.position)
    run.progress.waited = time.perf_counter() - begun
    return batches


def make(run: Run, state: TrainState, batches: list[Batch]) -> UpdateResult:
    """Make the next update, unless its loss is refused between the forward passes and the step."""
    update = state.update + 1
    run.watch.enter(PASSES, update)
    return run.engine.train_update(batches, run.health.accepts, lambda: run.watch.enter(STEP, update))


def record(run: Run, state: TrainState, result: UpdateResult) -> None:
    """Write the update down, and show it if a line is due."""
    seconds = run.progress.update()
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
        data_seconds=run.progress.waited,
    )
    run.health.note("update", update=state.update, loss=result.loss, grad_norm=result.grad_norm)
    if state.update in (1, run.total) or due(state, run.resolved.recipe.log.every):
        run.console.say(run.progress.line(state, result))


def save(run: Run, state: TrainState, last_chance: bool) -> None:
    """Begin a checkpoint, and end it too where the recipe does not save asynchronously, or it is the last."""
    run.watch.enter(SAVE, state.update)
    note_save(run, run.saver.finish())
    note_save(run, run.saver.save(state, wait=last_chance), last_chance)
    run.progress.pause()


def note_save(run: Run, attempt: Attempt | None, last_chance: bool = False) -> None:
    """Write down how a save ended. A failure is said, and only the fourth in a row, or one at the end, ends the run."""
    if attempt is None:
        return
    update, problem = attempt.state.update, attempt.problem
    seconds = {"stall_seconds": attempt.stall_seconds, "write_seconds": attempt.write_seconds}
    if not attempt.published:
        run.metrics.write("save_failed", update=update, error=problem, **seconds)
        run.console.say(f"{'NOT SAVED':>11}  update {update}: {problem}")
        if run.failed_saves.add() or last_chance:
            raise SaveFailed(problem)
        return
    run.failed_saves.end()
    run.health.note("checkpoint", update=update)
    run.metrics.write("checkpoint", update=update, path=str(attempt.folder), **seconds)
    if problem:
        run.console.say(f"{'SAVED, BUT':>11}  update {update}: {problem}")


def set_back(run: Run, state: TrainState, result: UpdateResult, found: Finding) -> TrainState:
    """Deal with an update that went wrong. A save that is under way ends first, if it may be what to go back to."""
    if found.remedy is Remedy.ROLL_BACK:
        run.watch.enter(SAVE, state.update)
        note_save(run, run.saver.finish())
    return recovery.bear(run, state, result, found)


def validate(run: Run, state: TrainState, limited: bool = True) -> str | None:
    """Measure the loss on held-out text, and let the model continue the recipe's prompt.

    Answers why to stop, if that is asked meanwhile; then the measurement is left, and made by the run that goes on.
    """
    recipe = run.resolved.recipe
    if not run.validation:
        return None

    def asked() -> str | None:
        run.watch.enter(EVALUATE, state.update)  # a sign of progress
        return agree(run, limited).stop

    asking = Asking(asked)
    losses = [(part, run.engine.evaluate(asking.until_stopped(part.batches()))) for part in run.validation]
    if asking.reason:
        run.metrics.write("validation_left", update=state.update, seconds=run.progress.pause())
        return asking.reason
    loss, bits = combine_losses(losses)
    apart = {part.prefix: one for part, one in losses} if len(losses) > 1 else {}
    shown = f"  {bits:.4f} bits per byte" if bits is not None else ""
    run.console.say(f"{'validation':>11}  loss {loss:7.4f}  perplexity {math.exp(loss):.2f}{shown}")
    for prefix, one in apart.items():
        run.console.say(f"{'':>11}  loss {one:7.4f}  {prefix}")
    if recipe.evaluation.prompt is not None and recipe.data.tokenizer is not None:
        run.watch.enter(SAMPLE, state.update)
        text = sample(run, recipe.evaluation.prompt, recipe.data.tokenizer)
        run.console.say(f"{'sample':>11}  {text}")
    numbers: dict[str, Any] = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits}
    numbers |= {"sources": apart} if apart else {}
    run.metrics.write("validation", update=state.update, **numbers, seconds=run.progress.pause())
    return None


def agree(run: Run, limited: bool = True) -> Verdict:
    """The one exchange in which all ranks agree whether to stop; a save under way takes its next step if it can."""
    verdict = run.stopping.verdict(run.saver.writing, limited)
    if not verdict.writing:
        note_save(run, run.saver.proceed())
    return verdict


def sample(run: Run, prompt: str, tokenizer: str) -> str:
    """`prompt` and 40 tokens more by the weights of this moment, on one line; "" on ranks other than 0."""
    main = run.rank.main
    weights = {name: value for name, value in run.engine.weights() if main}  # collective: every rank takes part
    text = generate.continue_line(weights, run.resolved.recipe.model, tokenizer, prompt) if main else ""
    run.agreement.barrier()  # in this phase, which may last: in the next one those who wait would be called hung
    return text


def leave(run: Run, state: TrainState, why: str) -> int:
    """Save what is not saved yet, as when an evaluation was left, and say why training stops here; the exit code."""
    run.watch.enter(SAVE, state.update)
    note_save(run, run.saver.finish())
    saved = run.rank.main and read(run.store.folder(state.update))[0] is not None
    if not all(run.agreement.any(saved)):
        save(run, state, last_chance=True)
    say_times(run, state)
    run.console.say(f"stopped by {why}, saved at update {state.update}. The same command goes on from there.")
    return EXIT_REQUEUE


def finish(run: Run, state: TrainState) -> int:
    """Say where everything is, and leave DONE: only after the last checkpoint was published and read back."""
    found, _ = run.store.newest_valid()
    if found is None or found.state != state:
        raise OSError(f"the last checkpoint, of update {state.update}, cannot be read back")
    say_times(run, state)
    run.metrics.write("done", **asdict(state))
    if run.rank.main:
        files.replace_json(run.path / DONE, asdict(state))
    run.console.say(f"done: {state.update:,} updates, {state.tokens:,} tokens, in {run.path}")
    run.console.say(f"next: megagpt evaluate {run.path}")
    return EXIT_DONE


def say_times(run: Run, state: TrainState) -> None:
    """Say and record where the run's seconds went, over all its restarts."""
    if run.rank.main:
        spent = metrics.spent(run.path)
        run.metrics.write("time", update=state.update, spent=asdict(spent), shares=spent.shares)
        run.console.say(f"time     {spent}")


def train(options: Options) -> int:
    """Train as the options say; the exit code. Called on every rank."""
    rank = from_environment(os.environ)
    try:
        preflight.check_world_size(rank, options.expect_world_size, preflight.ancestors())
        recipe = recipes.load(options.recipe, options.overrides)
        with rendezvous(rank, str(Path(recipe.run_dir).absolute())) as met:
            return _train(options, met, recipe)
    except UserError as error:
        if rank.local_rank == 0 or isinstance(error, MachineError):
            raise
        return EXIT_USER  # every rank of a host found the same mistake: it is said once


def _train(options: Options, rank: Rank, recipe: recipes.Recipe) -> int:
    console = Console(Path(recipe.run_dir), rank.rank)
    note = Note(Path(recipe.run_dir), rank)
    assembled = None

    def alarm(text: str) -> None:
        note.end(EXIT_FAILURE, text.removeprefix("megagpt: "))
        console.alarm(text)

    try:
        assembled = assemble(options, rank, recipe, console, alarm)
        if assembled is None:
            note.end(EXIT_DONE)
            return EXIT_DONE
        return _loop_and_close(*assembled, note)
    except UserError as error:
        note.end(error.exit_code, str(error))
        raise
    except Exception as error:
        traceback.print_exc()
        _say_failure(error, assembled[0] if assembled else None, rank, console, note)
        os._exit(EXIT_FAILURE)  # not through exit handlers: they would wait for ranks that wait for this one
    finally:
        console.close()


def _say_failure(error: Exception, run: Run | None, rank: Rank, console: Console, note: Note) -> None:
    """Say where training failed, and who was gone by then: a rank that is killed says nothing, its peers fail."""
    cause = f"in {run.watch.doing if run else 'the start'}: {type(error).__name__}: {error}{recovery.advice(error)}"
    note.end(EXIT_FAILURE, cause)
    console.alarm(f"megagpt: rank {rank.rank} failed {cause}\n  log: {console.log_path}")
    sys.stdout.flush()
    if run is None or rank.world_size == 1 or not isinstance(error, RuntimeError):  # as gloo's and NCCL's are
        return
    if gone := run.watch.gone():
        console.alarm("\n".join([f"megagpt: rank {rank.rank} failed without", *gone]))
        note.end(EXIT_FAILURE, "\n".join([cause, *gone]))


def _loop_and_close(run: Run, state: TrainState, note: Note) -> int:
    try:
        code = loop(run, state)
        note.end(code)
        run.agreement.barrier()  # srun and others end all ranks when the first one has ended with 75
    finally:
        run.watch.close()
        run.stopping.close()
        run.metrics.close()
    run.engine.close()  # not after a failure: NCCL would wait for ranks that wait for this one
    return code
