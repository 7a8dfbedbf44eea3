"""The checks of saving and resuming detect bugs: each planted bug fails a check.

| bug | check in tests/protocol.py |
|---|---|
| `latest` is written before the manifest | `a_kill_at_any_call_harms_nothing`, by `latest_names_a_whole_one` |
| the folder is renamed before the manifest is in it | `a_kill_at_any_call_harms_nothing` |
| a file's bytes are not compared with its checksum | `damage_is_passed_over` |
| the newest is chosen by `latest`, not by manifests | `damage_is_passed_over` |
| no barrier before the rename | `what_one_rank_cannot_write_is_published_by_none`, in test_saving_ranks.py |
| data position off by one after a resume | `same_run` |
| moments not restored | megagpt's own checksums; without them `same_run` |
| metrics not truncated | `same_run` |
"""

import shutil

import pytest

from megagpt import files
from megagpt.checkpoint import store as checkpoint
from megagpt.checkpoint.store import Store
from tests.faults.breaks import planting
from tests.protocol import Place, a_kill_at_any_call_harms_nothing, damage_is_passed_over, same_run
from tests.training import finish


def latest_first(monkeypatch):
    def seal(whole, final, real=checkpoint._seal):
        files.replace_text(final.parent / "latest", final.name + "\n")
        real(whole, final)

    monkeypatch.setattr(checkpoint, "_seal", seal)


def renamed_first(monkeypatch):
    def seal(whole, final, real=checkpoint._seal):
        files.rename(whole.folder, final)
        files.rename(final, whole.folder)  # so that the manifest is written later, with the same result
        real(whole, final)

    monkeypatch.setattr(checkpoint, "_seal", seal)


def sizes_only(monkeypatch):
    def verify(folder, *_):
        found, problem = checkpoint.read_manifest(folder)
        return found, problem or checkpoint.find_incomplete(found)

    monkeypatch.setattr(checkpoint, "verify", verify)


def chosen_by_latest(monkeypatch):
    def newest(store):
        folder = store.root / (store.root / "latest").read_text().strip()
        return checkpoint.read_manifest(folder)[0], []

    monkeypatch.setattr(Store, "newest_valid", newest)


def killed(folder):
    a_kill_at_any_call_harms_nothing(Place(folder))


def cut_short(folder):
    damage_is_passed_over(folder, lambda newest: (newest / "shard-0").write_bytes(b"we"), "shard-0 has 2 bytes, not 12")


def flipped(folder):
    said = "shard-0 is damaged: its checksum differs"
    damage_is_passed_over(folder, lambda newest: (newest / "shard-0").write_bytes(b"weights of 3"), said)


PROTOCOL = [(latest_first, killed), (renamed_first, killed), (sizes_only, flipped), (chosen_by_latest, cut_short)]


@pytest.mark.parametrize(("plant", "check"), PROTOCOL, ids=lambda function: function.__name__)
def test_a_bug_in_saving_fails_its_check(plant, check, tmp_path, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(tmp_path)


@pytest.fixture
def resumed(uninterrupted, recipe, tmp_path, monkeypatch):
    """Return a function that resumes a copy of the uninterrupted run at update 90 with a bug."""
    run = recipe.with_suffix("")
    shutil.copytree(uninterrupted, run)
    shutil.rmtree(run / "checkpoints/update_00000100")
    (tmp_path / "site").mkdir()

    def with_bug(name, code=0):
        planting(name, tmp_path / "site", monkeypatch)
        return run, finish(recipe, code=code)

    return with_bug


@pytest.mark.parametrize("name", ["position_off_by_one", "moments_not_restored_nor_verified", "metrics_not_truncated"])
def test_a_bug_in_resuming_changes_the_run(name, resumed, uninterrupted):
    run, printed = resumed(name)
    assert "resumed  at update 90," in printed
    with pytest.raises(AssertionError):
        same_run(run, uninterrupted)


def test_planting_no_bug_changes_nothing(resumed, uninterrupted):
    same_run(resumed("nothing")[0], uninterrupted)


def test_moments_that_are_not_restored_are_detected_before_the_first_update(resumed):
    _, printed = resumed("moments_not_restored", code=2)
    assert "tensors in the engine differ from those that were saved" in printed
    assert "exp_avg:" in printed
