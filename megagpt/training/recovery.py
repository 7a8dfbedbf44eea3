"""Recover from bad updates by a retry, a skip or a rollback, and check for other failures of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megagpt.errors import UserError
from megagpt.state import TrainState, UpdateResult
from megagpt.training.anomalies import MAX_ROLLBACKS, Action, Anomaly

if TYPE_CHECKING:
    from megagpt.training.setup import Run

_MAX_INTERRUPTED_STARTS = 3


def handle_bad_update(run: Run, state: TrainState, result: UpdateResult, anomaly: Anomaly) -> TrainState:
    """Carry out the action of an anomaly, and record and print it.

    Args:
        run: the run.
        state: the state before the update.
        result: the result of the update.
        anomaly: the anomaly of the update.

    Returns:
        The state to continue from.

    Raises:
        FloatingPointError: if the run cannot recover.
    """
    samples = run.loader.positions_used(state.position)
    last = state.position + samples - 1
    what = f"{anomaly.reason} in update {state.update + 1}, data positions {state.position} to {last}"
    if anomaly.action is Action.RETRY:
        return _retry(run, state, result, what)
    if anomaly.action is Action.SKIP:
        values = {"position": state.position, "samples": samples, "reason": anomaly.reason}
        run.metrics.write("skip", update=state.update, **values, seconds=run.progress.exclude())
        run.health.observe("skip", update=state.update, **values)
        run.console.say(f"{'SKIPPED':>11}  {what}; this data is left out")
        return state
    return _roll_back(run, state, anomaly.reason, what)


def _retry(run: Run, state: TrainState, result: UpdateResult, what: str) -> TrainState:
    """Repeat the update with the same data after an fp16 overflow, for which DeepSpeed has lowered the loss scale."""
    assert result.scale is not None  # an overflow is only possible with a loss scale
    scale, minimum = result.scale.value, result.scale.minimum
    values = {"position": state.position, "loss_scale": scale}
    run.metrics.write("overflow", update=state.update, **values, seconds=run.progress.exclude())
    run.console.say(f"{'OVERFLOW':>11}  {what}; the update is repeated at a lower loss scale")
    if scale <= minimum:
        raise FloatingPointError(
            f"{what}, which is the minimum. Try precision: bf16, or in fp16 a lower optimizer.lr, a longer warm-up, a "
            f"lower optimizer.clip, or an fp16.min_loss_scale below {minimum:g} in the DeepSpeed config"
        )
    return state


def _roll_back(run: Run, state: TrainState, reason: str, what: str) -> TrainState:
    """Go back to the newest valid checkpoint, and skip the data of the bad update.

    From the second rollback to the same checkpoint on, all data since that checkpoint is skipped, because skipping only
    the data of the bad update did not help.
    """
    checkpoint, _ = run.store.newest_valid()
    if checkpoint is None:
        raise FloatingPointError(f"{what}; there is no checkpoint to go back to")
    if run.health.rollbacks + 1 >= MAX_ROLLBACKS:
        raise FloatingPointError(f"{what}; the run has gone back {MAX_ROLLBACKS - 1} times already")
    end = state.position + run.loader.positions_used(state.position)
    first = checkpoint.state.position if run.health.rollbacks else state.position
    run.engine.load_state(checkpoint.folder)
    values = {"at": state.update + 1, "position": first, "samples": end - first}
    lost_seconds = run.metrics.truncate(checkpoint.state.update)
    seconds = {"lost_seconds": lost_seconds, "seconds": run.progress.exclude()}
    run.metrics.write("rollback", update=checkpoint.state.update, reason=reason, **values, **seconds)
    run.health.replay(run.metrics.replayable, run.collectives)
    run.health.observe("rollback", update=checkpoint.state.update, **values)
    run.console.say(
        f"{'ROLLED BACK':>11}  to update {checkpoint.state.update}: {what}; "
        f"data positions {first} to {end - 1} are left out"
    )
    return checkpoint.state


def advice(error: Exception) -> str:
    """Return advice if the error means that a device or its pinned host memory is out of memory, or "" otherwise."""
    if "out of memory" not in str(error):
        return ""
    return (
        "\n  do: set ds.train_micro_batch_size_per_gpu=1, then ds.activation_checkpointing.number_checkpoints=auto,"
        "\n      then a higher ZeRO stage, more ranks or offload; `megagpt plan` shows what fits. If much memory is"
        "\n      reserved but unallocated, export PYTORCH_ALLOC_CONF=expandable_segments:True"
    )


def refuse_repeated_interruption(run: Run, state: TrainState, reason: str) -> None:
    """Raise UserError if several consecutive starts were interrupted during the same evaluation.

    Otherwise the job would be requeued (exit code 75) forever.

    Args:
        run: the run.
        state: the state at which the evaluation is due.
        reason: reason for the current interruption.
    """
    if run.collectives.any(run.metrics.events_at_resume["validation_left"] >= _MAX_INTERRUPTED_STARTS):
        raise UserError(
            f"{_MAX_INTERRUPTED_STARTS} starts got no further than the evaluation of update {state.update}",
            f"this one was stopped by {reason}",
            "give the job more time, or lower evaluation.samples",
        )


def compare_replicas(run: Run, state: TrainState) -> None:
    """Check that all replicas of each weight are equal. Raises RuntimeError that names the weights and ranks if not."""
    if lines := run.engine.replicas_differ():
        run.metrics.write("replicas_differ", update=state.update, weights=lines)
        raise RuntimeError(
            f"ranks do not hold the same weights after update {state.update}, which was not saved. Possible causes: "
            "broken memory, a broken device, or a communication error\n  " + "\n  ".join(lines)
        )
