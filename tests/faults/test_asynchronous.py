"""Runs with asynchronous checkpoints are bit for bit equal to those with synchronous ones, also with interruptions."""

import contextlib
import json
import os
import signal
import time

import pytest

from megagpt.checkpoint import store
from tests.protocol import same_run
from tests.training import curve, events, finish, ranks, wait_for_update

ASYNCHRONOUS = "checkpoint.asynchronous=true"

# Writing the file that the environment variables describe waits until another file exists, or fails.
SLOW = """
import errno, os, threading, time
from pathlib import Path
from megagpt import files
real = files.write
def write(path, data):
    if os.environ["RANK"] == os.environ["ON_RANK"] and os.environ["ON_PATH"] in str(path):
        if os.environ["REFUSE"]:
            raise OSError(int(os.environ["REFUSE"]), os.strerror(int(os.environ["REFUSE"])))
        while not Path(os.environ["GO"]).exists():
            assert threading.current_thread() is not threading.main_thread()
            time.sleep(0.02)
    return real(path, data)
files.write = write
"""

# The 16th forward pass, which is that of update 16, yields NaN.
BAD = """
import torch
count, embedding = 0, torch.nn.functional.embedding
def bad(*arguments, **kwargs):
    global count
    count += 1
    return embedding(*arguments, **kwargs) * (float("nan") if count == 16 else 1.0)
torch.nn.functional.embedding = bad
"""


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """Make the writing of one checkpoint on one rank wait until the file `go` exists, or fail."""
    site, go = tmp_path / "site", tmp_path / "go"
    site.mkdir()
    paths = os.environ.get("PYTHONPATH", "")

    def plant(update, rank=0, refuse="", more=""):
        (site / "sitecustomize.py").write_text(SLOW + more)
        values = {"ON_RANK": rank, "ON_PATH": f".partial_update_{update:08d}/state", "REFUSE": refuse, "GO": go}
        for name, value in {"PYTHONPATH": f"{site}:{paths}", **values}.items():
            monkeypatch.setenv(name, str(value))
        return go

    yield plant
    monkeypatch.setenv("PYTHONPATH", paths)


def healthy(monkeypatch):
    """Make the disk fast again."""
    monkeypatch.setenv("ON_RANK", "none")


def saved(run):
    """Return the updates of all published checkpoints."""
    return [int(folder.name[7:]) for folder in store.Store(run).folders()]


def state_files(folder):
    return {path.name: path.read_bytes() for path in (folder / "state").iterdir()}


def order(run, *wanted):
    """Return the index of each event in the record."""
    rows = [(event["event"], event["update"]) for event in events(run)]
    return [rows.index(one) for one in wanted]


def test_training_continues_while_the_disk_is_slow_and_ends_with_the_same_bits(recipe, uninterrupted, disk):
    run, go = recipe.with_suffix(""), disk(update=10)
    with ranks(recipe, ASYNCHRONOUS) as (process,):
        wait_for_update(run, 20)  # the save at update 20 is due, and waits for that of update 10
        assert saved(run) == []
        go.write_text("")
        printed = process.communicate(timeout=180)[0]
        assert process.returncode == 0
    assert "SAVED" not in printed
    positions = order(run, ("update", 20), ("checkpoint", 10), ("update", 21), ("checkpoint", 20))
    assert positions[:3] == sorted(positions[:3])
    assert positions[3] > positions[2]
    same_run(run, uninterrupted)
    assert (run / "DONE").exists()
    assert saved(run) == saved(uninterrupted) == [80, 90, 100]
    for update in saved(run):
        folder = f"checkpoints/update_{update:08d}"
        assert state_files(run / folder) == state_files(uninterrupted / folder)


def test_a_run_killed_while_writing_a_checkpoint_resumes_from_the_previous_one(
    recipe, uninterrupted, disk, monkeypatch
):
    run = recipe.with_suffix("")
    disk(update=20)
    with ranks(recipe, ASYNCHRONOUS) as (process,):
        wait_for_update(run, 30)
        process.kill()
    assert saved(run) == [10]
    healthy(monkeypatch)
    assert "resumed  at update 10," in finish(recipe, ASYNCHRONOUS)
    same_run(run, uninterrupted)


def wait_for_phase(run, phase, update, seconds=180):
    """Wait until the heartbeat of rank 0 shows this phase and update."""
    for _ in range(int(seconds / 0.05)):
        with contextlib.suppress(OSError, ValueError):
            beat = json.loads((run / "logs/rank-0.heartbeat").read_text())
            if (beat["phase"], beat["update"]) == (phase, update):
                return
        time.sleep(0.05)
    raise TimeoutError(f"{run} has not come to phase {phase} of update {update}")


def test_a_rollback_waits_for_the_checkpoint_being_written_and_uses_it(recipe, disk):
    run, go = recipe.with_suffix(""), disk(update=10, more=BAD)
    with ranks(recipe, ASYNCHRONOUS, "length.updates=20", "evaluation.every=null", "health.skips=0") as (process,):
        wait_for_phase(run, "save", 15)
        assert saved(run) == []
        go.write_text("")
        printed = process.communicate(timeout=180)[0]
        assert process.returncode == 0
    assert "ROLLED BACK  to update 10: the loss is nan in update 16" in printed
    positions = order(run, ("update", 10), ("checkpoint", 10), ("rollback", 10), ("update", 11))
    assert positions == sorted(positions)
    assert [update["position"] for update in curve(run)] == [4 * n for n in (*range(1, 16), *range(17, 22))]


SHORT = ("length.updates=20", "evaluation.every=null", "checkpoint.every=5", "checkpoint.keep_last=null")


def test_a_signal_while_a_checkpoint_is_being_written_publishes_it_and_another(
    recipe, data, tmp_path, disk, monkeypatch
):
    run, go = recipe.with_suffix(""), disk(update=5, rank=1)
    with ranks(recipe, *SHORT, ASYNCHRONOUS, world=2) as started:
        wait_for_update(run, 7)
        started[1].send_signal(signal.SIGUSR1)  # the save of update 5 cannot end yet
        go.write_text("")
        printed = [process.communicate(timeout=180) for process in started]
        assert [process.returncode for process in started] == [75, 75], printed
    stopped = events(run)[-1]
    assert saved(run) == [5, stopped["update"]]
    assert f"saved at update {stopped['update']}." in printed[0][0]
    healthy(monkeypatch)
    assert f"resumed  at update {stopped['update']}," in finish(recipe, *SHORT, ASYNCHRONOUS, world=2)
    straight = recipe.with_name("straight.yaml")
    straight.write_text(recipe.read_text().replace(str(run), str(straight.with_suffix(""))))
    finish(straight, *SHORT, world=2)
    same_run(run, straight.with_suffix(""))


def test_a_write_error_on_one_pipeline_stage_fails_the_save_but_not_the_next_one(recipe, disk, monkeypatch):
    run = recipe.with_suffix("")
    straight = recipe.with_name("straight.yaml")
    straight.write_text(recipe.read_text().replace(str(run), str(straight.with_suffix(""))))
    finish(straight, *SHORT, world=2, config="pipeline2")
    disk(update=10, rank=1, refuse=28)
    printed = finish(recipe, *SHORT, ASYNCHRONOUS, world=2, config="pipeline2")
    assert printed.count("NOT SAVED  update 10: rank 1: No space left on device\n") == 1
    assert saved(run) == [5, 15, 20]
    assert saved(straight.with_suffix("")) == [5, 10, 15, 20]
    assert [event["update"] for event in events(run) if event["event"] == "save_failed"] == [10]
    same_run(run, straight.with_suffix(""))
