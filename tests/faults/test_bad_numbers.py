"""NaN, spikes, fp16 overflows and a flipped bit in real runs: which updates are skipped, repeated, or end the run."""

import os
import shutil

import pytest

from tests.training import curve, events, final_weights, finish

FAULT = """
import os, torch
count, real = 0, torch.nn.functional.embedding
at = [int(number) for number in os.environ["FAULT_AT"].split()]
def embedding(ids, weight, *arguments, **kwargs):
    global count
    count += 1
    if os.environ["FAULT"] == "loss" and count - 1 in at:
        weight.data /= 1024  # the update was not made
    if count not in at or os.environ["RANK"] != os.environ["FAULT_RANK"]:
        return real(ids, weight, *arguments, **kwargs)
    if os.environ["FAULT"] == "bit":
        weight.data.view(torch.int32)[0, 0] ^= 1 << 20
    if os.environ["FAULT"] == "loss":
        weight.data *= 1024  # and so the tied head's logits
    result = real(ids, weight, *arguments, **kwargs)
    if os.environ["FAULT"] == "gradient":
        result.register_hook(lambda gradient: gradient * 1e6)
    return result * float("nan") if os.environ["FAULT"] == "nan" else result
torch.nn.functional.embedding = embedding
"""
SHORT = ("length.updates=40", "checkpoint.keep_last=null")


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Plant a fault in some forward passes of one rank. There is one per update before the first evaluation."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(FAULT)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")

    def plant(fault, *at, rank=0):
        for name, value in {"FAULT": fault, "FAULT_AT": " ".join(map(str, at)), "FAULT_RANK": str(rank)}.items():
            monkeypatch.setenv(name, value)

    return plant


def decisions(run):
    return [event for event in events(run) if event["event"] in ("skip", "rollback", "overflow")]


def check_positions(run, left_out):
    """Check that every data position except those left out was used once and in order, and no update is missing."""
    assert [update["update"] for update in curve(run)] == list(range(1, 41))
    used = [update["position"] - 4 for update in curve(run)]
    assert used == [position for position in range(0, 160 + 4 * len(left_out), 4) if position not in left_out]


def check_replay(recipe, run, plant, world, *overrides):
    """Resume from the first checkpoint without the fault: the recorded decisions must give the same bits."""
    kept, weights, decided = curve(run), final_weights(run), decisions(run)
    for folder in sorted((run / "checkpoints").glob("update_*"))[1:]:
        shutil.rmtree(folder)
    plant("nan")
    assert "resumed  at update 10" in finish(recipe, *SHORT, *overrides, world=world)
    assert curve(run) == kept
    assert final_weights(run) == weights
    assert decisions(run) == decided


def test_nan_on_one_rank_is_skipped_by_all_and_its_data_is_never_used(recipe, plant):
    run = recipe.with_suffix("")
    plant("nan", 16, rank=1)
    printed = finish(recipe, *SHORT, world=2)
    (event,) = decisions(run)
    assert (event["event"], event["update"], event["position"], event["samples"]) == ("skip", 15, 60, 4)
    assert "SKIPPED  the loss is nan in update 16, data positions 60 to 63" in printed
    check_positions(run, {60})
    check_replay(recipe, run, plant, 2)


def test_too_many_skips_in_a_row_roll_back(recipe, plant):
    run = recipe.with_suffix("")
    plant("nan", 16, 17, 18)
    printed = finish(recipe, *SHORT, "health.skips=2")
    assert [(event["event"], event["update"], event["position"]) for event in decisions(run)] == [
        ("skip", 15, 60),
        ("skip", 15, 64),
        ("rollback", 10, 68),
    ]
    assert "ROLLED BACK  to update 10: the loss is nan in update 16" in printed
    check_positions(run, {60, 64, 68})
    check_replay(recipe, run, plant, 1, "health.skips=2")


def test_a_second_failure_after_a_rollback_skips_all_data_since_the_checkpoint(recipe, plant):
    run = recipe.with_suffix("")
    plant("nan", 16, 23)  # one pass while resuming and five good updates, so that update 16 is bad again
    finish(recipe, *SHORT, "health.skips=0")
    found = [(event["event"], event["update"], event["position"], event["samples"]) for event in decisions(run)]
    assert found == [("rollback", 10, 60, 4), ("rollback", 10, 40, 28)]
    check_positions(run, set(range(40, 68, 4)))
    check_replay(recipe, run, plant, 1, "health.skips=0")


def test_a_spike_of_the_loss_is_skipped_and_the_window_survives_a_restart(recipe, plant):
    run, overrides = recipe.with_suffix(""), ("health.loss_spike=20", "health.window=12")
    plant("loss", 16)
    printed = finish(recipe, *SHORT, *overrides)
    (event,) = decisions(run)
    assert (event["event"], event["update"], event["position"]) == ("skip", 15, 60)
    assert "deviations above" in event["reason"]
    assert "SKIPPED  the loss is " in printed
    check_positions(run, {60})
    check_replay(recipe, run, plant, 1, *overrides)

    for folder in sorted((run / "checkpoints").glob("update_*"))[2:]:
        shutil.rmtree(folder)
    plant("loss", 3)  # the second update since the restart, at which only the record can have filled the window
    finish(recipe, *SHORT, *overrides)
    assert [(event["event"], event["update"], event["position"]) for event in decisions(run)] == [
        ("skip", 15, 60),
        ("skip", 21, 88),
    ]
    check_positions(run, {60, 88})


def test_a_spike_of_the_gradient_norm_rolls_back_at_once(recipe, plant):
    run, overrides = recipe.with_suffix(""), ("health.norm_spike=1e4", "health.window=12")
    plant("gradient", 16)
    printed = finish(recipe, *SHORT, *overrides)
    (event,) = decisions(run)
    assert (event["event"], event["update"], event["position"]) == ("rollback", 10, 60)
    assert "ROLLED BACK  to update 10: the gradient norm is " in printed
    check_positions(run, {60})
    check_replay(recipe, run, plant, 1, *overrides)


def test_an_overflow_loses_no_data_and_the_scale_survives_a_restart(fp16, recipe, tmp_path):
    run, overrides = recipe.with_suffix(""), (*SHORT, "precision=fp16", "ds.fp16.loss_scale_window=7")
    printed = finish(recipe, *overrides, "ds.fp16.initial_scale_power=30")
    overflows = decisions(run)
    assert {event["event"] for event in overflows} == {"overflow"}
    start = [event for event in overflows if event["update"] == 0]
    assert len(start) > 2
    assert f"OVERFLOW  the gradient overflows at loss scale {2**30:g} in update 1, data positions 0 to 3" in printed
    check_positions(run, set())
    kept, weights = curve(run), final_weights(run)

    power = (int(start[-1]["loss_scale"]) // 2).bit_length() - 1  # a constant scale that does not overflow
    right = ("ds.fp16.hysteresis=1", f"ds.fp16.initial_scale_power={power}", f"run_dir={tmp_path / 'right'}")
    finish(recipe, *overrides, *right)
    assert curve(tmp_path / "right") == kept
    assert 0 not in {event["update"] for event in decisions(tmp_path / "right")}

    for folder in sorted((run / "checkpoints").glob("update_*"))[1:]:
        shutil.rmtree(folder)
    finish(recipe, *overrides, "ds.fp16.initial_scale_power=30")
    assert curve(run) == kept
    assert final_weights(run) == weights
    again = decisions(run)
    assert [(row["update"], row["loss_scale"]) for row in again] == [
        (row["update"], row["loss_scale"]) for row in overflows
    ]


def test_an_overflow_at_the_minimum_loss_scale_ends_the_run_with_advice(fp16, recipe):
    scale = ("ds.fp16.initial_scale_power=30", f"ds.fp16.min_loss_scale={2**30}")
    printed = finish(recipe, "precision=fp16", *scale, code=1)
    assert "FloatingPointError: the gradient overflows at loss scale 1.07374e+09 in update 1" in printed
    assert "Try precision: bf16" in printed


def test_one_flipped_bit_ends_the_run_before_it_is_saved(recipe, plant):
    run = recipe.with_suffix("")
    plant("bit", 12, rank=1)
    overrides = ("ds.zero_optimization.stage=0", "health.compare_every=5", "checkpoint.every=15")
    printed = finish(recipe, *overrides, world=2, code=1)
    assert "ranks do not hold the same weights after update 15" in printed
    assert "layers.0.weight differs between rank 0 and rank 1" in printed
    assert not list((run / "checkpoints").glob("update_*"))
