"""A save that is written beside training publishes what was at its beginning, and training does go on meanwhile."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megagpt import files
from megagpt.checkpoint import store
from megagpt.checkpoint.async_saver import Saver
from megagpt.cluster import Collectives, Rank
from tests.protocol import attempt, names, save, state_of


class Side(Collectives):
    """One of two ranks that are threads of this process."""

    def __init__(self, rank, values, barrier):
        super().__init__(1)
        self._rank, self._values, self._barrier = rank, values, barrier

    def all_gather_object(self, value):
        self._values[self._rank] = json.dumps(value)
        self._barrier.wait(timeout=60)
        answer = [json.loads(self._values[rank]) for rank in (0, 1)]
        self._barrier.wait(timeout=60)
        return answer


def save_on_two(runs, asynchronous):
    """How a save ends for each of two ranks, each with the run directory that it sees."""
    texts, barrier = {}, threading.Barrier(2)
    with ThreadPoolExecutor(2) as ranks:
        ends = [
            ranks.submit(attempt, run, 3, None, asynchronous, Rank(rank, world_size=2), Side(rank, texts, barrier))
            for rank, run in enumerate(runs)
        ]
        return [end.result() for end in ends]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_ranks_publish_one_checkpoint_of_all_their_files(tmp_path, asynchronous):
    for ended in save_on_two([tmp_path, tmp_path], asynchronous):
        assert (ended.published, ended.problem, ended.folder.name) == (True, "", "update_00000003")
    found, _ = store.newest_valid(tmp_path)
    assert {*found.facts["files"]} == {"shard-0", "shard-1", "deep/moments-0", "deep/moments-1"}


def test_ranks_that_do_not_see_the_same_folder_publish_nothing(tmp_path):
    for ended in save_on_two([tmp_path / "host-0", tmp_path / "host-1"], False):
        assert not ended.published
        said = "rank 0: shard-1 is missing on rank 0's host: all ranks need the same run directory"
        assert ended.problem == said


@pytest.fixture
def gate(monkeypatch):
    """Set: files may be written. Until then whoever writes one waits."""
    opened, write = threading.Event(), files.write

    def wait(path, data):
        assert opened.wait(timeout=60)
        return write(path, data)

    monkeypatch.setattr(files, "write", wait)
    return opened


def saver(run, weights, asynchronous=True):
    return Saver(store.Store(run), lambda sink: sink("weights", bytes(weights)), {}, asynchronous)


def test_training_goes_on_while_a_file_is_written_and_what_is_published_is_the_old_state(tmp_path, gate):
    weights = bytearray(b"then")
    one = saver(tmp_path, weights)
    assert one.save(state_of(10)) is None
    assert one.writing
    weights[:] = b"now!"  # updates are made
    assert one.writing
    assert names(tmp_path) == [".partial_update_00000010"]
    gate.set()
    ended = one.finish()
    assert (ended.published, ended.state) == (True, state_of(10))
    assert (ended.folder / "weights").read_bytes() == b"then"
    assert not one.writing
    assert one.finish() is None


def test_a_save_is_published_step_by_step_between_updates(tmp_path):
    one = saver(tmp_path, b"then")
    assert one.advance() is None
    assert one.save(state_of(10)) is None
    ended, updates = None, 0
    while ended is None:
        updates += 1
        ended = one.advance()
    assert updates >= 2  # the files, then the manifest: each may take as long as it likes
    assert store.newest_valid(tmp_path)[0].state == state_of(10)


def test_both_ways_of_saving_leave_the_same_bytes(tmp_path):
    folders = [save(tmp_path / str(way), 3, asynchronous=way) for way in (False, True)]
    contents = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in folders
    ]
    assert len(contents[0]) == 3
    assert contents[0] == contents[1]


def test_training_waits_for_a_synchronous_save_and_a_last_one(tmp_path):
    for asynchronous, wait in ((False, False), (False, True), (True, True)):
        one = saver(tmp_path / f"{asynchronous}{wait}", b"", asynchronous)
        assert one.save(state_of(1), wait).published


def test_the_stall_ends_when_the_state_is_copied(tmp_path, gate, monkeypatch):
    write, now = files.write, [0.0]

    def slow(path, data):
        written = write(path, data)
        now[0] += 100.0
        return written

    monkeypatch.setattr(files, "write", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    one = saver(tmp_path, b"then")
    one.save(state_of(10))
    gate.set()
    while not (ended := one.advance()):
        pass
    assert (ended.blocking_seconds, ended.write_seconds) == (0.0, 300.0)  # the weights, the manifest, `latest`


def test_a_save_begun_before_the_last_one_has_ended_is_a_bug(tmp_path):
    one = saver(tmp_path, b"")
    one.save(state_of(1))
    with pytest.raises(AssertionError, match="one save at a time"):
        one.save(state_of(2))
    assert one.finish().published


def advance_when_written(saver):
    while saver.writing:
        time.sleep(0.001)
    saver.advance()


@pytest.mark.parametrize("end", [advance_when_written, Saver.finish])
def test_a_bug_on_the_thread_is_not_lost(tmp_path, monkeypatch, end):
    def broken(path, data):
        raise ZeroDivisionError

    monkeypatch.setattr(files, "write", broken)
    one = saver(tmp_path, b"")
    one.save(state_of(1))
    with pytest.raises(ZeroDivisionError):
        end(one)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_closed_saver_accepts_no_more_work_but_finishes_what_it_has(tmp_path, gate, asynchronous):
    one = saver(tmp_path, b"then", asynchronous)
    if asynchronous:
        one.save(state_of(10))
    one.close()
    gate.set()
    if asynchronous:
        while one.writing:
            time.sleep(0.001)
        assert names(tmp_path) == [".partial_update_00000010"]
        with pytest.raises(RuntimeError, match="after shutdown"):
            one.advance()
