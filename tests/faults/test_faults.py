"""Bad numbers, hangs and a full disk, each really made to happen."""

import os
import shutil
import signal
import subprocess

import pytest

from tests.training import curve, events, final_weights, finish, ranks, wait_for_update

NAN = """
import os, torch
count, real = 0, torch.nn.functional.embedding
def embedding(*arguments, **words):
    global count
    count += 1
    result = real(*arguments, **words)
    return result * float("nan") if count == int(os.environ["NAN_AT"]) and os.environ["RANK"] == "1" else result
torch.nn.functional.embedding = embedding
"""


@pytest.fixture
def nan(tmp_path, monkeypatch):
    """On rank 1, one forward pass yields NaN: the 16th, before the first evaluation."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(NAN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("NAN_AT", "16")


def test_nan_on_one_rank_takes_all_back_and_leaves_that_data_out_for_good(recipe, nan, monkeypatch, tmp_path):
    run = recipe.with_suffix("")
    words = ("length.updates=40", "checkpoint.keep_last=null")
    printed = finish(recipe, *words, world=2)
    (event,) = (event for event in events(run) if event["event"] == "rollback")
    assert (event["update"], event["samples"]) == (10, 4)
    bad = event["position"]
    assert 40 <= bad < 80
    assert "ROLLED BACK  to update 10: the loss is nan in update" in printed
    assert [update["update"] for update in curve(run)] == list(range(1, 41))
    used = [update["position"] - 4 for update in curve(run)]  # each position once, but for those that were left out
    assert used == [position for position in range(0, 164, 4) if position != bad]
    assert all(update["loss"] == update["loss"] for update in curve(run))

    monkeypatch.setenv("NAN_AT", "0")  # the same decisions give the same bits, without the fault
    kept, weights = curve(run), final_weights(run)
    for folder in sorted((run / "checkpoints").glob("update_*"))[1:]:
        shutil.rmtree(folder)
    assert "resumed  at update 10" in finish(recipe, *words, world=2)
    assert curve(run) == kept
    assert final_weights(run) == weights


def test_a_stopped_rank_is_named_with_its_phase(recipe):
    run = recipe.with_suffix("")
    with ranks(recipe, "log.hang_after=4", "length.updates=100000", world=2) as started:
        wait_for_update(run, 6)
        started[1].send_signal(signal.SIGSTOP)
        error = started[0].communicate(timeout=60)[1]
        assert started[0].returncode == 1
    assert "megagpt: rank 0 has made no progress for " in error
    lines = error.splitlines()
    assert lines[1].startswith("  rank 1: ")
    assert "stopped or dead" in lines[1]
    assert "most recent call first" in (run / "logs/rank-0.log").read_text()


def test_a_full_disk_stops_no_run_and_harms_no_checkpoint(recipe, uninterrupted, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        with ranks(recipe, f"run_dir={disk}/run", "checkpoint.every=8") as (process,):
            wait_for_update(disk / "run", 12)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            assert process.returncode == 75
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
        printed = finish(recipe, f"run_dir={disk}/run", "checkpoint.every=8", code=1)
        assert printed.count("NOT SAVED  update ") == 4  # trained on after three; the fourth in a row is the end
        assert "MB free, a checkpoint needs" in printed
        (disk / "filler").unlink()
        finish(recipe, f"run_dir={disk}/run")
        assert curve(disk / "run") == curve(uninterrupted)
        assert final_weights(disk / "run") == final_weights(uninterrupted)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
