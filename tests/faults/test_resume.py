"""A run that is stopped in any way and restarted ends with the same numbers as an uninterrupted one."""

import shutil
import signal

import pytest

from megagpt import cli
from tests.faults.launches import SLOW_DATA, launch
from tests.protocol import same_run
from tests.training import curve, events, finish, wait_for_update

LAST = 100


def test_the_uninterrupted_run_learns(uninterrupted):
    losses = [update["loss"] for update in curve(uninterrupted)]
    assert len(losses) == LAST
    assert losses[-1] < losses[0] - 1
    assert all(update["grad_norm"] > 0 for update in curve(uninterrupted))


def hit(recipe, update, act):
    """Train until a signal arrives in the optimizer step of this update. Returns the exit code and the output."""
    fault = {"kind": "phase", "name": act, "phase": "step", "update": update, "act": act}
    with launch(recipe, folder=recipe.parent, world=1, faults=[fault]) as alone:
        return *alone.wait(180), alone.printed()


def test_a_run_killed_twice_without_warning_ends_bit_for_bit_the_same(recipe, uninterrupted):
    for update in (13, 45):
        assert hit(recipe, update, "SIGKILL")[0] == -signal.SIGKILL
    printed = finish(recipe)
    assert "resumed  at update 40," in printed
    same_run(recipe.with_suffix(""), uninterrupted)


def test_a_signal_saves_that_very_update_and_exits_75(recipe, uninterrupted):
    run = recipe.with_suffix("")
    code, printed = hit(recipe, 4, "SIGTERM")
    assert code == 75
    saved, time = events(run)[-2:]
    assert (saved["event"], saved["update"], time["event"]) == ("checkpoint", 4, "time")
    assert "Stopped by SIGTERM; checkpoint saved at update 4." in printed
    assert curve(run)[-1]["update"] == 4
    assert "resumed  at update 4," in finish(recipe)
    same_run(run, uninterrupted)


def test_the_time_limit_saves_and_exits_75(recipe):
    printed = finish(recipe, "--max-minutes", "0", code=75)
    assert "Stopped by the time limit; checkpoint saved at update 1." in printed


def test_a_damaged_checkpoint_is_skipped_and_reported(recipe, uninterrupted, tmp_path):
    run = recipe.with_suffix("")
    assert hit(recipe, 23, "SIGKILL")[0] == -signal.SIGKILL
    newest = sorted((run / "checkpoints").glob("update_*"))[-1]
    weights = newest / "state/rank-00000-000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    printed = finish(recipe)
    assert f"note     skipped damaged checkpoint {newest.name}: state/rank-00000-000.safetensors has" in printed
    same_run(run, uninterrupted)


def copy(uninterrupted, recipe):
    run = recipe.with_suffix("")
    shutil.copytree(uninterrupted, run)
    return run


def test_a_complete_run_reports_that_it_is_complete(uninterrupted, recipe):
    run = copy(uninterrupted, recipe)
    before = (run / "metrics.jsonl").read_bytes()
    assert finish(recipe) == "Run already complete (100 of 100 updates). To continue, increase `length`.\n"
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_longer_length_continues_the_run(uninterrupted, recipe):
    run = copy(uninterrupted, recipe)
    finish(recipe, "length.updates=104")
    assert [update["update"] for update in curve(run)] == list(range(1, 105))


def test_an_allowed_change_is_reported_and_takes_effect_on_resume(uninterrupted, recipe):
    run = copy(uninterrupted, recipe)
    shutil.rmtree(run / "checkpoints/update_00000100")
    command = ("schedule.min_lr=0.001", "--allow-change", "schedule")
    printed = finish(recipe, "--max-minutes", "0", *command, code=75)
    assert "note     changed: schedule.min_lr  0.0 then, 0.001 now\n" in printed
    assert "changed: schedule" not in finish(recipe, *command)  # as when a job script runs the same command again
    rates = [update["lr"] for update in curve(run)]
    straight = [update["lr"] for update in curve(uninterrupted)]
    assert rates[:90] == straight[:90]
    for number, (rate, before) in enumerate(zip(rates, straight, strict=True), start=1):
        if number > 90:  # the part above min_lr decays as the whole rate did before
            assert rate == pytest.approx(0.001 + before * (0.003 - 0.001) / 0.003)


def test_megagpt_stop_ends_a_run_as_a_signal_does(recipe, uninterrupted):
    run = recipe.with_suffix("")
    with launch(recipe, folder=recipe.parent, world=1, faults=[SLOW_DATA]) as alone:
        wait_for_update(run, 3)
        assert cli.main(["stop", str(run)]) == 0
        assert alone.wait(180) == [75]
        printed = alone.printed()
    assert "Stopped by megagpt stop; checkpoint saved at update" in printed
    assert cli.main(["stop", str(run)]) == 75  # the run is not active, so the next start is not stopped
    (run / "STOP").touch()  # nor does a leftover file stop it
    finish(recipe)
    same_run(run, uninterrupted)


REFUSED = {
    "another recipe": (
        ["optimizer.lr=0.01", "model.n_layer=1"],
        "megagpt: the recipe is not the one that this run was trained with: update_00000100\n"
        "  model.n_layer  2 then, 1 now\n"
        "  optimizer.lr  0.003 then, 0.01 now\n"
        "  do: train with {run}/recipe.yaml, choose another run_dir to start over, "
        "or allow each change by name: --allow-change KEY\n",
    ),
    "another number of ranks": (
        ["--expect-world-size", "2"],
        "megagpt: expected 2 ranks, but 1 started\n"
        "  launcher: environment, --expect-world-size 2\n"
        "  do: check the hostfile's path and slots, or the launcher's number of processes\n",
    ),
    "one change of two allowed": (
        ["optimizer.lr=0.01", "schedule.min_lr=0.001", "--allow-change", "schedule.min_lr"],
        "megagpt: the recipe is not the one that this run was trained with: update_00000100\n"
        "  optimizer.lr  0.003 then, 0.01 now\n"
        "  do: train with {run}/recipe.yaml, choose another run_dir to start over, "
        "or allow each change by name: --allow-change KEY\n",
    ),
    "a change allowed of what there is not": (
        ["--allow-change", "schedule.min_rate"],
        "megagpt: the recipe has no such key\n"
        "  --allow-change schedule.min_rate\n"
        "  do: write KEY, SECTION.KEY or SECTION\n",
    ),
    "never": (
        ["--resume", "never"],
        "megagpt: this run already has checkpoints, and --resume never would overwrite them\n"
        "  {run}/checkpoints\n"
        "  do: choose another run_dir, remove this one, or resume with --resume auto\n",
    ),
    "a word that is none": (
        ["--resume", "perhaps"],
        "megagpt: there is no such way to resume\n  --resume perhaps\n  do: write auto, must or never\n",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_incompatible_changes_are_refused_with_a_reason(uninterrupted, recipe, case):
    run = copy(uninterrupted, recipe)
    arguments, message = REFUSED[case]
    before = sorted(run.rglob("*"))
    assert finish(recipe, *arguments, code=2) == message.format(run=run)
    assert sorted(run.rglob("*")) == before


def test_another_stage_and_offload_resume_with_a_note(uninterrupted, recipe):
    run = copy(uninterrupted, recipe)
    shutil.rmtree(run / "checkpoints/update_00000100")
    printed = finish(recipe, "ds.zero_optimization.stage=3")
    assert "note     layout changed: zero_stage  1 then, 3 now\n" in printed
    assert curve(run)[:90] == curve(uninterrupted)[:90]
    for now, then in zip(curve(run)[90:], curve(uninterrupted)[90:], strict=True):
        assert now["position"] == then["position"]
        assert now["lr"] == then["lr"]
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-5)


def test_resume_must_requires_a_checkpoint(recipe):
    run = recipe.with_suffix("")
    assert finish(recipe, "--resume", "must", code=2) == (
        "megagpt: there is no checkpoint to resume from\n"
        f"  {run}/checkpoints\n"
        "  do: check run_dir, or use --resume auto\n"
    )


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(uninterrupted, recipe):
    run = copy(uninterrupted, recipe)
    for folder in (run / "checkpoints").glob("update_*"):
        (folder / "manifest.json").unlink()
    printed = finish(recipe, code=2)
    expected = "megagpt: this run has checkpoints, but all are damaged\n  update_00000100: manifest.json"
    assert printed.startswith(expected)
    assert len(curve(run)) == LAST
