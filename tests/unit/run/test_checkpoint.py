"""A checkpoint is there whole, or not at all; damage is found before use, and named."""

import json

import pytest

from megagpt.run import checkpoint
from megagpt.state import TrainState


def save(run, update, keep_last=3, write=None):
    def default(folder):
        (folder / "shard").write_bytes(b"weights of %d" % update)
        (folder / "deep").mkdir()
        (folder / "deep" / "moments").write_bytes(bytes(1000))

    return checkpoint.publish(
        run, TrainState(update, update * 8, update * 1024), write or default,
        facts={"layout": {"world_size": 1}}, keep_last=keep_last, main=True, barrier=lambda: None,
    )  # fmt: skip


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_published_checkpoint_is_found_with_its_state_and_facts(tmp_path):
    save(tmp_path, 3)
    found, skipped = checkpoint.newest_valid(tmp_path)
    assert (found.folder.name, found.state, skipped) == ("update_00000003", TrainState(3, 24, 3072), [])
    assert found.facts["layout"] == {"world_size": 1}
    assert (tmp_path / "checkpoints/latest").read_text() == "update_00000003\n"


def test_an_empty_run_has_none(tmp_path):
    assert checkpoint.newest_valid(tmp_path) == (None, [])


DAMAGE = {
    "a file cut short": (lambda f: (f / "shard").write_bytes(b"we"), "shard has 2 bytes, not 12"),
    "a flipped bit": (
        lambda f: (f / "deep/moments").write_bytes(bytes(999) + b"\x01"),
        "deep/moments is damaged: its checksum differs",
    ),
    "a file gone": (lambda f: (f / "deep/moments").unlink(), "deep/moments is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
    "half a manifest": (
        lambda f: (f / "manifest.json").write_text('{"state"'),
        "manifest.json cannot be read",
    ),
    "a manifest of something else": (
        lambda f: (f / "manifest.json").write_text("{}"),
        "manifest.json cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path, damage):
    save(tmp_path, 1)
    spoil, word = DAMAGE[damage]
    spoil(save(tmp_path, 2))
    found, skipped = checkpoint.newest_valid(tmp_path)
    assert found.state.update == 1
    assert len(skipped) == 1
    assert skipped[0].startswith(f"update_00000002: {word}")


@pytest.mark.parametrize("failing_after", [0, 1])
def test_a_save_that_fails_leaves_the_old_ones_and_is_cleared_by_the_next(tmp_path, failing_after):
    save(tmp_path, 1)

    def break_off(folder):
        if failing_after:
            (folder / "shard").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, write=break_off)
    assert checkpoint.newest_valid(tmp_path)[0].state.update == 1
    save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "update_00000001", "update_00000002"]


def test_only_the_last_are_kept(tmp_path):
    for update in (1, 2, 3, 4):
        save(tmp_path, update, keep_last=2)
    assert names(tmp_path) == ["latest", "update_00000003", "update_00000004"]


def test_null_keeps_all(tmp_path):
    for update in (1, 2, 3, 4):
        save(tmp_path, update, keep_last=None)
    assert len(names(tmp_path)) == 5


def test_a_lying_hint_does_not_matter(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints/latest").write_text("update_00000099\n")
    assert checkpoint.newest_valid(tmp_path)[0].state.update == 1


def test_a_damaged_checkpoint_is_replaced_when_its_update_comes_again(tmp_path):
    folder = save(tmp_path, 2)
    (folder / "shard").unlink()
    save(tmp_path, 2)
    assert checkpoint.newest_valid(tmp_path)[0].state.update == 2


def test_every_file_stands_in_the_manifest(tmp_path):
    manifest = json.loads((save(tmp_path, 1) / "manifest.json").read_text())
    assert set(manifest["files"]) == {"shard", "deep/moments"}
    assert manifest["files"]["deep/moments"]["bytes"] == 1000
