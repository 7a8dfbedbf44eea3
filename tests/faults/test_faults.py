"""Real hangs, a killed rank and a full disk."""

import re
import shutil
import signal
import socket
import subprocess

import pytest

from megagpt.training import status
from tests.faults.launches import launch
from tests.training import curve, final_weights, finish, ranks, wait_for_update


def test_a_stopped_rank_is_named_with_its_phase(recipe):
    run = recipe.with_suffix("")
    with ranks(recipe, "log.hang_after=4", "length.updates=100000", world=2) as started:
        wait_for_update(run, 6)
        started[1].send_signal(signal.SIGSTOP)
        error = started[0].communicate(timeout=180)[1]
        assert started[0].returncode == 1
    host = socket.gethostname()
    assert f"megagpt: rank 0 on {host} has made no progress for " in error
    lines = error.splitlines()
    assert lines[1].startswith(f"  rank 1 on {host}: ")
    assert "stopped or dead" in lines[1]
    assert "most recent call first" in (run / "logs/rank-0.log").read_text()


def test_a_killed_rank_is_named_by_the_remaining_ones(recipe):
    run, host = recipe.with_suffix(""), socket.gethostname()
    with ranks(recipe, "length.updates=100000", world=2) as started:
        wait_for_update(run, 6)
        started[1].kill()
        error = started[0].communicate(timeout=180)[1]
        assert started[0].returncode == 1
    assert error.startswith("megagpt: rank 0 failed in ")
    assert "rank-0.log" in error
    assert re.search(
        rf"\nmegagpt: rank 0 failed without\n  rank 1 on {host}: .+  silent for \d+ s: stopped or dead\n", error
    )
    assert f"  rank 1 on {host}: " in status.read(run).why


def test_a_full_disk_stops_no_run_and_harms_no_checkpoint(recipe, uninterrupted, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a full disk: only root can mount one")
    try:
        stop = {"kind": "phase", "name": "stop", "phase": "step", "update": 12, "act": "SIGTERM"}
        overrides = (f"run_dir={disk}/run", "checkpoint.every=8")
        with launch(recipe, *overrides, folder=tmp_path, world=1, faults=[stop]) as alone:
            assert alone.wait(180) == [75], alone.printed()
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
        printed = finish(recipe, *overrides, code=1)
        assert (
            printed.count("NOT SAVED  update ") == 4
        )  # training continues after three failures; the fourth in a row ends the run
        assert "MB free, a checkpoint needs" in printed
        (disk / "filler").unlink()
        finish(recipe, f"run_dir={disk}/run")
        assert curve(disk / "run") == curve(uninterrupted)
        assert final_weights(disk / "run") == final_weights(uninterrupted)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
