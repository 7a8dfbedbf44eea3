"""A checkpoint is there whole, or not at all; damage is found before use, and named."""

import errno
import json

import pytest

from megagpt.run import checkpoint
from tests import protocol
from tests.protocol import attempt, names, save, state_of


def test_a_published_checkpoint_is_found_with_its_state_and_facts(tmp_path):
    save(tmp_path, 3)
    found, skipped = checkpoint.newest_valid(tmp_path)
    assert (found.folder.name, found.state, skipped) == ("update_00000003", state_of(3), [])
    assert found.facts["layout"] == {"world_size": 1}
    assert (tmp_path / "checkpoints/latest").read_text() == "update_00000003\n"


def test_an_empty_run_has_none(tmp_path):
    assert checkpoint.newest_valid(tmp_path) == (None, [])


DAMAGE = {
    "a file cut short": (lambda f: (f / "shard-0").write_bytes(b"we"), "shard-0 has 2 bytes, not 12"),
    "a flipped bit": (
        lambda f: (f / "deep/moments-0").write_bytes(bytes(999) + b"\x01"),
        "deep/moments-0 is damaged: its checksum differs",
    ),
    "a file gone": (lambda f: (f / "deep/moments-0").unlink(), "deep/moments-0 is missing"),
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


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_whichever_file_call_fails_what_is_published_stays_whole(tmp_path, number, asynchronous):
    protocol.a_failing_call_harms_nothing(tmp_path, number, asynchronous)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_killed_at_whichever_file_call_what_is_published_stays_whole(tmp_path, asynchronous):
    protocol.a_kill_at_any_call_harms_nothing(tmp_path, asynchronous)


def test_an_error_inside_one_ranks_part_is_a_failed_save(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints/file").write_text("")

    def broken(sink):
        sink("shard-0", b"x")
        sink("shard-0/below", b"a file is no folder")
        sink("more", b"x")

    ended = attempt(tmp_path, 2, write=broken)
    assert not ended.published
    assert ended.problem.startswith("rank 0: ")
    assert checkpoint.newest_valid(tmp_path)[0].state.update == 1


def test_too_little_room_is_found_before_a_byte_is_written(tmp_path):
    save(tmp_path, 1)
    ended = attempt(tmp_path, 2, needed=10**18)
    assert not ended.published
    assert ended.problem.endswith("MB free, a checkpoint needs 1,200,000,000,000 MB")
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
    (folder / "deep/moments-0").write_bytes(bytes(999) + b"\x01")
    answers = [checkpoint.check(folder, part, 2)[1] for part in (0, 1)]
    assert sorted(answers) == ["", "deep/moments-0 is damaged: its checksum differs"]


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
    (folder / "shard-0").unlink()
    save(tmp_path, 2)
    assert checkpoint.newest_valid(tmp_path)[0].state.update == 2


def test_every_file_stands_in_the_manifest(tmp_path):
    manifest = json.loads((save(tmp_path, 1) / "manifest.json").read_text())
    assert set(manifest["files"]) == {"shard-0", "deep/moments-0"}
    assert manifest["files"]["deep/moments-0"]["bytes"] == 1000
