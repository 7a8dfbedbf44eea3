"""A checkpoint is there whole, or not at all; damage is found before use, and named."""

import errno
import json
import os
import signal

import pytest

from megagpt.run import checkpoint
from megagpt.state import TrainState


def save(run, update, keep_last=3, write=None, keep_every=None, needed=0):
    def default(sink):
        sink("shard", b"weights of %d" % update)
        sink("deep/moments", bytes(1000))

    store = checkpoint.Store(run, keep_last=keep_last, keep_every=keep_every, needed=needed)
    return store.publish(TrainState(update, update * 8, update * 1024), write or default, {"layout": {"world_size": 1}})


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


CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")  # all that change the disk


def sabotage(monkeypatch, run, at, act):
    """Let `act` take the place of the `at`-th changing file call; the number of calls is counted in the result."""
    seen = []

    def wrap(call):
        def wrapped(*arguments, **words):
            changes = call.__name__ != "open" or arguments[1] & os.O_CREAT
            if changes:
                seen.append(call.__name__)
                if len(seen) == at:
                    act()
            return call(*arguments, **words)

        return wrapped

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    return seen


def fail(number):
    def act():
        raise OSError(number, os.strerror(number))

    return act


def calls_of_a_save(tmp_path, monkeypatch):
    """How many calls it takes to publish a third checkpoint and to remove the first."""
    for update in (1, 2):
        save(tmp_path / "count", update, keep_last=2)
    with monkeypatch.context() as patch:
        seen = sabotage(patch, tmp_path, 0, None)
        save(tmp_path / "count", 3, keep_last=2)
    assert {"open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir"} == {*seen}
    return len(seen)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_whichever_file_call_fails_what_is_published_stays_whole(tmp_path, monkeypatch, number):
    failed = []
    for at in range(1, calls_of_a_save(tmp_path, monkeypatch) + 1):
        run = tmp_path / str(at)
        for update in (1, 2):
            save(run, update, keep_last=2)
        with monkeypatch.context() as patch:
            sabotage(patch, run, at, fail(number))
            try:
                save(run, 3, keep_last=2)
            except checkpoint.SaveFailed as error:
                failed.append(str(error))
        found, skipped = checkpoint.newest_valid(run)
        assert found.state.update in (2, 3), at
        assert skipped == []
        save(run, 4, keep_last=2)
        assert checkpoint.newest_valid(run)[0].state.update == 4
        assert not [name for name in names(run) if name.startswith(".")], at
    assert len(failed) >= 20  # making a folder that is there already may fail
    assert all(error.startswith(f"rank 0: {os.strerror(number)}") for error in failed)


def test_killed_at_whichever_file_call_what_is_published_stays_whole(tmp_path, monkeypatch):
    for at in range(1, calls_of_a_save(tmp_path, monkeypatch) + 1):
        run = tmp_path / str(at)
        for update in (1, 2):
            save(run, update, keep_last=2)
        child = os.fork()
        if child == 0:
            sabotage(monkeypatch, run, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            save(run, 3, keep_last=2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        found, skipped = checkpoint.newest_valid(run)
        assert found.state.update in (2, 3), at
        assert skipped == []
        save(run, 4, keep_last=2)
        assert not [name for name in names(run) if name.startswith(".")], at


def test_an_error_inside_one_ranks_part_is_a_failed_save(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints/file").write_text("")

    def broken(sink):
        sink("shard", b"x")
        sink("shard/below", b"a file is no folder")
        sink("more", b"x")

    with pytest.raises(checkpoint.SaveFailed, match="rank 0: "):
        save(tmp_path, 2, write=broken)
    assert checkpoint.newest_valid(tmp_path)[0].state.update == 1


def test_too_little_room_is_found_before_a_byte_is_written(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(checkpoint.SaveFailed, match="MB free, a checkpoint needs 1,200,000,000,000 MB"):
        save(tmp_path, 2, needed=10**18)
    assert checkpoint.newest_valid(tmp_path)[0].state.update == 1


def test_every_flipped_byte_every_cut_and_every_missing_file_is_found(tmp_path):
    folder = save(tmp_path, 1)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert checkpoint.newest_valid(tmp_path)[0] is None, (path, place)
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert checkpoint.newest_valid(tmp_path)[0] is None, (path, length)
        path.unlink()
        assert checkpoint.newest_valid(tmp_path)[0] is None
        path.write_bytes(whole)
        assert checkpoint.newest_valid(tmp_path)[0] is not None


def test_ranks_share_the_reading_and_between_them_read_every_byte(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "deep/moments").write_bytes(bytes(999) + b"\x01")
    answers = [checkpoint.check(folder, part, 2)[1] for part in (0, 1)]
    assert sorted(answers) == ["", "deep/moments is damaged: its checksum differs"]


def test_every_so_many_and_pinned_ones_are_kept(tmp_path):
    for update in range(1, 8):
        folder = save(tmp_path, update, keep_last=1, keep_every=3)
        if update == 2:
            (folder / checkpoint.PINNED).write_text("")
    assert names(tmp_path) == ["latest", *(f"update_0000000{n}" for n in (2, 3, 6, 7))]
    assert checkpoint.newest_valid(tmp_path)[0].state.update == 7


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
