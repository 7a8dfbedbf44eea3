"""What a run does about an update with bad numbers: make it again, leave its data out, or go back to a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megagpt.errors import UserError
from megagpt.state import TrainState, UpdateResult
from megagpt.training.anomalies import MOST_ROLLBACKS, Finding, Remedy

if TYPE_CHECKING:
    from megagpt.training.setup import Run

_MOST_VAIN = 3


def bear(run: Run, state: TrainState, result: UpdateResult, found: Finding) -> TrainState:
    """Do what `found` asks for, write it down and say it; the state to go on from.

    Raises FloatingPointError where there is nothing left to be done.
    """
    samples = run.loader.positions_used(state.position)
    where = f"update {state.update + 1}, data positions {state.position} to {state.position + samples - 1}"
    if found.remedy is Remedy.AGAIN:
        return _again(run, state, result, f"{found.reason} in {where}")
    if found.remedy is Remedy.SKIP:
        values = {"position": state.position, "samples": samples, "reason": found.reason}
        run.metrics.write("skip", update=state.update, **values, seconds=run.progress.pause())
        run.health.note("skip", update=state.update, **values)
        run.console.say(f"{'SKIPPED':>11}  {found.reason} in {where}; that data is left out")
        return state
    return _roll_back(run, state, found.reason, where)


def _again(run: Run, state: TrainState, result: UpdateResult, what: str) -> TrainState:
    """fp16's gradient did not fit: DeepSpeed lowers the loss scale, and the same data comes again."""
    assert result.scale is not None  # else there is no overflow
    scale, least = result.scale.value, result.scale.minimum
    values = {"position": state.position, "loss_scale": scale}
    run.metrics.write("overflow", update=state.update, **values, seconds=run.progress.pause())
    run.console.say(f"{'OVERFLOW':>11}  {what}; it is made again")
    if scale <= least:
        raise FloatingPointError(
            f"{what}, the smallest that it may become. Try precision: bf16, or in fp16 a lower optimizer.lr, a longer "
            f"warm-up, a lower optimizer.clip, or an fp16.min_loss_scale below {least:g} in the DeepSpeed config"
        )
    return state


def _roll_back(run: Run, state: TrainState, reason: str, where: str) -> TrainState:
    """Go back to the newest valid checkpoint, and leave out the data of the update that went wrong.

    The second time, all data since that checkpoint is left out: the same way would lead to the same place.
    """
    checkpoint, _ = run.store.newest_valid()
    if checkpoint is None:
        raise FloatingPointError(f"{reason} in {where}; there is no checkpoint to go back to")
    if run.health.rollbacks + 1 >= MOST_ROLLBACKS:
        raise FloatingPointError(f"{reason} in {where}; the run has gone back {MOST_ROLLBACKS - 1} times already")
    end = state.position + run.loader.positions_used(state.position)
    first = checkpoint.state.position if run.health.rollbacks else state.position
    run.engine.load_state(checkpoint.folder)
    numbers = {"at": state.update + 1, "position": first, "samples": end - first}
    seconds = {"lost_seconds": run.metrics.go_back(checkpoint.state.update), "seconds": run.progress.pause()}
    run.metrics.write("rollback", update=checkpoint.state.update, reason=reason, **numbers, **seconds)
    run.health.recall(run.metrics.decisive, run.agreement)
    run.health.note("rollback", update=checkpoint.state.update, **numbers)
    run.console.say(
        f"{'ROLLED BACK':>11}  to update {checkpoint.state.update}: {reason} in {where}; "
        f"data positions {first} to {end - 1} are left out"
    )
    return checkpoint.state


def advice(error: Exception) -> str:
    """What to try where a device, or what it transfers from, has no memory left; nothing for other errors."""
    if "out of memory" not in str(error):
        return ""
    return (
        "\n  do: set ds.train_micro_batch_size_per_gpu=1, then ds.activation_checkpointing.number_checkpoints=auto;"
        "\n      then a higher ZeRO stage, more ranks or offload: `megagpt plan` shows what fits. Where much is"
        "\n      reserved but unallocated, export PYTORCH_ALLOC_CONF=expandable_segments:True"
    )


def refuse_vain_starts(run: Run, state: TrainState, why: str) -> None:
    """Raise UserError where starts in a row did nothing but a part of the same evaluation: 75 would go on for ever."""
    if all(run.agreement.any(run.metrics.here["validation_left"] >= _MOST_VAIN)):
        what = f"{_MOST_VAIN} starts did nothing but begin the evaluation of update {state.update}"
        raise UserError(what, f"this one was stopped by {why}", "give a job more time, or evaluation.samples fewer")


def compare_replicas(run: Run, state: TrainState) -> None:
    """Check that ranks that should hold the same weights do. Raises RuntimeError naming weights and ranks."""
    if lines := run.engine.replicas_differ():
        run.metrics.write("replicas_differ", update=state.update, weights=lines)
        raise RuntimeError(
            f"ranks do not hold the same weights after update {state.update}, and this was not saved: broken memory, "
            "a broken device, or a fault in communication\n  " + "\n  ".join(lines)
        )
