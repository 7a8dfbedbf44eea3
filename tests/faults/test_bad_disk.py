"""A disk that becomes read-only, or only a part of it: no checkpoint is damaged, and the error is reported."""

import subprocess

import pytest

from megagpt.checkpoint import store
from tests.protocol import same_run
from tests.training import curve, events, finish


@pytest.fixture
def checkpoints(recipe):
    """The folder of a run's checkpoints, on a disk of its own."""
    folder = recipe.with_suffix("") / "checkpoints"
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a read-only disk: only root can mount one")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def remount(folder, how):
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


def test_a_read_only_disk_harms_no_checkpoint_and_is_reported(recipe, uninterrupted, checkpoints):
    run = recipe.with_suffix("")
    finish(recipe, "--max-minutes", "0", code=75)
    remount(checkpoints, "ro")
    printed = finish(recipe, "checkpoint.every=4", code=1)
    assert "resumed  at update 1," in printed
    lines = [line for line in printed.splitlines() if "NOT SAVED" in line]
    assert len(lines) == 4  # training continues after three failures; the fourth in a row ends the run
    assert all("rank 0: Read-only file system" in line for line in lines)
    assert [event["update"] for event in events(run) if event["event"] == "save_failed"] == [4, 8, 12, 16]
    assert curve(run)[-1]["update"] == 16
    assert [folder.name for folder in store.Store(run).folders()] == ["update_00000001"]
    assert store.newest_valid(run)[0].state.update == 1
    remount(checkpoints, "rw")
    finish(recipe)
    same_run(run, uninterrupted)


def test_errors_after_a_checkpoint_is_published_are_reported_and_stop_nothing(recipe):
    run = recipe.with_suffix("")
    blocked = run / "checkpoints/latest.new"
    blocked.mkdir(parents=True)  # prevents writing `latest`, and nothing else
    printed = finish(recipe, "length.updates=50", "evaluation.every=null")
    for update in (10, 20, 30, 40, 50):  # more than the consecutive failures that would end the run
        assert f"SAVED, BUT  update {update}: Is a directory ({blocked})\n" in printed
    assert "NOT SAVED" not in printed
    assert store.newest_valid(run)[0].state.update == 50
    assert (run / "DONE").exists()
