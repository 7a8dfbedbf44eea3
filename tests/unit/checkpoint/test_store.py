"""A checkpoint is there whole, or not at all; damage is found before use, and named."""

import errno
import json
import shutil
import zlib

import pytest

from megagpt import files
from megagpt.checkpoint import store
from tests.protocol import (
    Place,
    a_failing_call_harms_nothing,
    a_kill_at_any_call_harms_nothing,
    attempt,
    damage_is_passed_over,
    names,
    save,
    state_of,
    what_one_rank_cannot_write_is_published_by_none,
)


def test_a_published_checkpoint_is_found_with_its_state_and_facts(tmp_path):
    save(tmp_path, 3)
    found, skipped = store.newest_valid(tmp_path)
    assert (found.folder.name, found.state, skipped) == ("update_00000003", state_of(3), [])
    assert found.facts["layout"] == {"world_size": 1}
    assert (tmp_path / "checkpoints/latest").read_text() == "update_00000003\n"


def test_an_empty_run_has_none(tmp_path):
    assert store.newest_valid(tmp_path) == (None, [])


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
        "manifest.json is damaged: its checksum differs",
    ),
    "a manifest of something else": (
        lambda f: (f / "manifest.json").write_text("{}"),
        "manifest.json is damaged: its checksum differs",
    ),
    "a manifest of another time": (
        lambda f: (f / "manifest.json").write_bytes(b'{"checksum": %d,' % zlib.crc32(ANOTHER) + ANOTHER),
        "manifest.json cannot be read (",
    ),
    "a manifest whose numbers are texts": (
        lambda f: (f / "manifest.json").write_bytes(b'{"checksum": %d,' % zlib.crc32(TEXTS) + TEXTS),
        "manifest.json cannot be read (",
    ),
    "a file that is a link out of the checkpoint": (
        lambda f: (f / "shard-0").replace(f.parent / "shard-0") and (f / "shard-0").symlink_to(f.parent / "shard-0"),
        "shard-0 leads out of the checkpoint",
    ),
}
TEXTS = b' "state": {}, "files": {"shard-0": {"bytes": "12", "crc32": 0}}}'
ANOTHER = b' "state": {"step": 1}}'


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path, damage):
    damage_is_passed_over(tmp_path, *DAMAGE[damage])


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_whichever_file_call_fails_what_is_published_stays_whole(tmp_path, number, asynchronous):
    a_failing_call_harms_nothing(Place(tmp_path, asynchronous), number)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_killed_at_whichever_file_call_what_is_published_stays_whole(tmp_path, asynchronous):
    a_kill_at_any_call_harms_nothing(Place(tmp_path, asynchronous))


def test_an_error_inside_one_ranks_part_is_a_failed_save(tmp_path):
    place = Place(tmp_path)
    place.two_saved(tmp_path)
    what_one_rank_cannot_write_is_published_by_none(place, tmp_path, on_rank=0)


def test_too_little_room_is_found_before_a_byte_is_written(tmp_path):
    save(tmp_path, 1)
    ended = attempt(tmp_path, 2, min_bytes=10**18)
    assert not ended.published
    assert ended.problem.endswith("MB free, a checkpoint needs 1,200,000,000,000 MB")
    assert store.newest_valid(tmp_path)[0].state.update == 1


def test_every_flipped_bit_every_cut_and_every_missing_file_is_found(tmp_path):
    def write(sink):
        sink("shard", bytes(range(64)))
        sink("deep/moments", b"")

    folder = save(tmp_path, 1, write=write)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        spoiled = [b"", whole + b"\n", *(whole[:length] for length in range(1, len(whole)))]
        for place, byte in enumerate(whole):
            spoiled += [whole[:place] + bytes([byte ^ 1 << bit]) + whole[place + 1 :] for bit in range(8)]
        for content in {*spoiled} - {whole}:
            path.write_bytes(content)
            assert store.newest_valid(tmp_path)[0] is None, (path, content)
        path.unlink()
        assert store.newest_valid(tmp_path)[0] is None
        path.write_bytes(whole)
        assert store.newest_valid(tmp_path)[0] is not None


def test_no_character_of_a_manifest_may_stand_for_another(tmp_path):
    path = save(tmp_path, 1) / "manifest.json"
    whole = path.read_bytes()
    for old, new in ((b"\n", b"\r"), (b"\n", b"\r\n"), (b" ", b"\t"), (b": ", b":")):
        path.write_bytes(whole.replace(old, new, 1))
        assert store.newest_valid(tmp_path)[0] is None, (old, new)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def bad_sector(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    folder = save(tmp_path, 1)
    monkeypatch.setattr(files, "crc32", bad_sector)
    found, wrong = store.verify(folder)
    assert found is None
    assert wrong == f"shard-0 cannot be read (Input/output error ({folder / 'shard-0'}))"


def test_ranks_share_the_reading_and_between_them_read_every_byte(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "deep/moments-0").write_bytes(bytes(999) + b"\x01")
    answers = [store.verify(folder, part, 2)[1] for part in (0, 1)]
    assert sorted(answers) == ["", "deep/moments-0 is damaged: its checksum differs"]


def test_every_so_many_and_pinned_ones_are_kept(tmp_path):
    for update in range(1, 8):
        folder = save(tmp_path, update, keep_last=1, keep_every=3)
        if update == 2:
            (folder / store.PINNED).write_text("")
    assert names(tmp_path) == ["latest", *(f"update_0000000{n}" for n in (2, 3, 6, 7))]
    assert store.newest_valid(tmp_path)[0].state.update == 7


def test_only_the_last_are_kept(tmp_path):
    for update in (1, 2, 3, 4):
        save(tmp_path, update, keep_last=2)
    assert names(tmp_path) == ["latest", "update_00000003", "update_00000004"]


def test_null_keeps_all(tmp_path):
    for update in (1, 2, 3, 4):
        save(tmp_path, update, keep_last=None)
    assert len(names(tmp_path)) == 5


@pytest.mark.parametrize("hint", ["update_00000099\n", "update_00000001\n", "", "../..", None])
def test_a_hint_that_lies_or_is_missing_does_not_matter(tmp_path, hint):
    for update in (1, 2):
        save(tmp_path, update)
    (tmp_path / "checkpoints/latest").unlink()
    if hint is not None:
        (tmp_path / "checkpoints/latest").write_text(hint)
    assert store.newest_valid(tmp_path)[0].state.update == 2
    save(tmp_path, 3)
    assert (tmp_path / "checkpoints/latest").read_text() == "update_00000003\n"


def test_a_damaged_checkpoint_that_is_newer_never_takes_the_place_of_a_whole_one(tmp_path):
    save(tmp_path, 10)
    (save(tmp_path, 20) / "shard-0").write_bytes(b"weights of 99")  # passed over: the run goes on from 10
    save(tmp_path, 15, keep_last=1)
    found, skipped = store.newest_valid(tmp_path)
    assert found.state == state_of(15)
    assert [line[:15] for line in skipped] == ["update_00000020"]


def test_a_folder_by_another_name_is_no_checkpoint(tmp_path):
    shutil.copytree(save(tmp_path, 1), tmp_path / "checkpoints/update_00000009 (copy)")
    for update in (2, 3, 4):
        save(tmp_path, update)
    assert store.newest_valid(tmp_path)[0].folder.name == "update_00000004"
    assert "update_00000009 (copy)" in names(tmp_path)


def test_a_damaged_checkpoint_is_replaced_when_its_update_comes_again(tmp_path):
    folder = save(tmp_path, 2)
    (folder / "shard-0").unlink()
    save(tmp_path, 2)
    assert store.newest_valid(tmp_path)[0].state.update == 2


def test_every_file_stands_in_the_manifest(tmp_path):
    manifest = json.loads((save(tmp_path, 1) / "manifest.json").read_text())
    assert set(manifest["files"]) == {"shard-0", "deep/moments-0"}
    assert manifest["files"]["deep/moments-0"]["bytes"] == 1000
