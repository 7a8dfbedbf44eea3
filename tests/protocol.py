"""What must hold of saving, as checks: the tests make them of the code, and of code that was broken on purpose.

Each check really makes the fault happen, in this process or in a child of it, and asserts what is left.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from megagpt.checkpoint import store as checkpoint
from megagpt.checkpoint.async_saver import Saver, SaveResult
from megagpt.cluster import Collectives, Rank
from megagpt.files import WriteFile
from megagpt.state import TrainState
from tests import training

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")  # all that change the disk


def state_of(update: int) -> TrainState:
    """Where a run stands after an update."""
    return TrainState(update, update * 8, update * 1024)


def attempt(
    run: Path,
    update: int,
    write: Callable[[WriteFile], None] | None = None,
    asynchronous: bool = False,
    rank: Rank = Rank(),  # noqa: B008  # frozen
    collectives: Collectives | None = None,
    **keep: int | None,
) -> SaveResult:
    """One whole save of two small files a rank."""

    def files(sink: WriteFile) -> None:
        sink(f"shard-{rank.rank}", b"weights of %d" % update)
        sink(f"deep/moments-{rank.rank}", bytes(1000))

    store = checkpoint.Store(run, rank, collectives or Collectives(1), **{"keep_last": 3, **keep})
    ended = Saver(store, write or files, {"layout": {"world_size": 1}}, asynchronous).save(state_of(update), wait=True)
    assert ended is not None
    return ended


def save(run: Path, update: int, **more: object) -> Path:
    """A save that must go well; the checkpoint's folder."""
    ended = attempt(run, update, **more)
    assert (ended.published, ended.problem) == (True, "")
    return ended.folder


def names(run: Path) -> list[str]:
    """What lies among the checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@contextmanager
def sabotage(at: int, act: Callable[[], None]) -> Iterator[list[str]]:
    """Within it `act` goes before the `at`-th changing file call; the names of all that were made are yielded."""
    seen: list[str] = []

    def wrap(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **words: object) -> object:
            if call.__name__ != "open" or arguments[1] & os.O_CREAT:
                seen.append(call.__name__)
                if len(seen) == at:
                    act()
            return call(*arguments, **words)

        return wrapped

    with patch.multiple(os, **{name: wrap(getattr(os, name)) for name in CALLS}):
        yield seen


def failing(number: int) -> Callable[[], None]:
    """An act that is refused by the system."""

    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


@dataclass(frozen=True)
class Place:
    """Where a check runs: on which rank and how saves are made there."""

    folder: Path
    asynchronous: bool = False
    rank: Rank = field(default_factory=Rank)
    collectives: Collectives = field(default_factory=lambda: Collectives(1))

    def attempt(self, run: Path, update: int) -> SaveResult:
        """A save that leaves two checkpoints."""
        return attempt(run, update, None, self.asynchronous, self.rank, self.collectives, keep_last=2)

    def save(self, run: Path, update: int) -> None:
        """A save that must go well."""
        ended = self.attempt(run, update)
        assert (ended.published, ended.problem) == (True, "")

    def two_saved(self, run: Path) -> None:
        """A run whose next save, of update 3, removes its oldest checkpoint."""
        for update in (1, 2):
            self.save(run, update)

    def calls_of_a_save(self, on_rank: int = 0) -> int:
        """How many file calls a third save makes on a rank."""
        self.two_saved(self.folder / "count")
        with sabotage(0, failing(errno.EIO)) as seen:
            self.save(self.folder / "count", 3)
        assert {*CALLS} == {*seen} or not self.rank.main
        return int(self.collectives.all_gather_object(len(seen))[on_rank])

    def goes_on(self, run: Path) -> None:
        """The next save works, and leaves nothing over of the one that did not."""
        self.save(run, 4)
        assert checkpoint.newest_valid(run)[0].state == state_of(4)
        assert names(run)[-1] == "update_00000004"
        assert not [name for name in names(run) if name.startswith(".")]


def latest_names_a_whole_one(run: Path) -> None:
    """`latest` is a hint, but whatever stops a save, it hints at what is there."""
    named = (run / "checkpoints/latest").read_text().strip()
    found, wrong = checkpoint.verify(run / "checkpoints" / named)
    assert found is not None, wrong


def a_failing_call_harms_nothing(place: Place, number: int, on_rank: int = 0) -> None:
    """Whichever file call fails on one rank: all say the same of the save, it is true, and the next one is good."""
    failed = noted = 0
    said = os.strerror(number)
    for at in range(1, place.calls_of_a_save(on_rank) + 1):
        run = place.folder / str(at)
        place.two_saved(run)
        with sabotage(at if place.rank.rank == on_rank else 0, failing(number)):
            ended = place.attempt(run, 3)
        answers = place.collectives.all_gather_object([ended.published, ended.problem])
        assert all(answer == answers[0] for answer in answers), (at, answers)
        found, skipped = checkpoint.newest_valid(run)
        assert (found.state, skipped) == (state_of(3 if ended.published else 2), []), at
        latest_names_a_whole_one(run)
        if ended.published:  # the call was behind the rename; or it made a folder that is there already
            assert ended.problem.startswith(said) or not ended.problem, at
        else:
            assert ended.problem.startswith(f"rank {on_rank}: {said}"), at
        failed += not ended.published
        noted += ended.published and bool(ended.problem)
        place.goes_on(run)
    assert failed >= 6
    assert noted >= 8 or on_rank


def what_one_rank_cannot_write_is_published_by_none(place: Place, run: Path, on_rank: int) -> None:
    """An error in one rank's part is a failed save on all, and the newest checkpoint is that of update 2 still."""

    def write(sink: WriteFile) -> None:
        sink(f"shard-{place.rank.rank}", b"x")
        if place.rank.rank == on_rank:
            sink(f"shard-{on_rank}/below", b"a file is no folder")
            sink("more", b"x")

    ended = attempt(run, 3, write, place.asynchronous, place.rank, place.collectives)
    assert {*place.collectives.all_gather_object(ended.published)} == {False}
    assert ended.problem.startswith(f"rank {on_rank}: ")
    assert checkpoint.newest_valid(run)[0].state == state_of(2)


def a_kill_at_any_call_harms_nothing(place: Place) -> None:
    """Killed without warning at whichever file call, the newest checkpoint is the one before, or the new one, whole."""
    for at in range(1, Place(place.folder).calls_of_a_save() + 1):
        run = place.folder / str(at)
        Place(place.folder).two_saved(run)  # without a thread: this process is about to fork
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests, which the child does not use
            child = os.fork()
        if child == 0:
            with sabotage(at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                place.attempt(run, 3)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        found, skipped = checkpoint.newest_valid(run)
        assert found.state in (state_of(2), state_of(3)), at
        assert skipped == []
        latest_names_a_whole_one(run)
        Place(place.folder).goes_on(run)


def damage_is_passed_over(folder: Path, spoil: Callable[[Path], object], said: str) -> None:
    """A damaged checkpoint is named, with what is wrong with it, and the one before it is taken."""
    save(folder, 1)
    spoil(save(folder, 2))
    found, skipped = checkpoint.newest_valid(folder)
    assert found.state == state_of(1)
    assert len(skipped) == 1
    assert skipped[0].startswith(f"update_00000002: {said}")


def same_run(run: Path, straight: Path) -> None:
    """A run that was stopped and started again did what one that never stopped did."""
    assert training.curve(run) == training.curve(straight)
    assert training.final_weights(run) == training.final_weights(straight)
    done = [json.loads((folder / "DONE").read_text()) for folder in (run, straight)]
    assert done[0] == done[1]
