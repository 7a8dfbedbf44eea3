"""What must hold of saving, as checks: the tests make them of the code, and of code that was broken on purpose.

Each check really makes the fault happen, in this process or in a child of it, and asserts what is left.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from megagpt.distributed import Agreement, Rank
from megagpt.files import Write
from megagpt.run import checkpoint
from megagpt.run.saving import Attempt, Saver
from megagpt.state import TrainState

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")  # all that change the disk
FULL, BROKEN, FORBIDDEN = errno.ENOSPC, errno.EIO, errno.EACCES


def state_of(update: int) -> TrainState:
    """Where a run stands after an update."""
    return TrainState(update, update * 8, update * 1024)


def attempt(
    run: Path,
    update: int,
    write: Callable[[Write], None] | None = None,
    asynchronous: bool = False,
    rank: Rank = Rank(),  # noqa: B008  # frozen
    agreement: Agreement | None = None,
    **keep: int | None,
) -> Attempt:
    """One whole save of two small files a rank."""

    def files(sink: Write) -> None:
        sink(f"shard-{rank.rank}", b"weights of %d" % update)
        sink(f"deep/moments-{rank.rank}", bytes(1000))

    store = checkpoint.Store(run, rank, agreement or Agreement(1), **{"keep_last": 3, **keep})
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


def two_saved(run: Path) -> None:
    """A run whose next save, of update 3, removes its oldest checkpoint."""
    for update in (1, 2):
        save(run, update, keep_last=2)


def calls_of_a_save(folder: Path) -> int:
    """How many file calls a third save makes."""
    two_saved(folder / "count")
    with sabotage(0, failing(BROKEN)) as seen:
        save(folder / "count", 3, keep_last=2)
    assert {*CALLS} == {*seen}
    return len(seen)


def latest_names_a_whole_one(run: Path) -> None:
    """`latest` is a hint, but whatever stops a save, it hints at what is there."""
    named = (run / "checkpoints/latest").read_text().strip()
    found, wrong = checkpoint.check(run / "checkpoints" / named)
    assert found is not None, wrong


def goes_on(run: Path) -> None:
    """The next save works, and leaves nothing over of the one that did not."""
    save(run, 4, keep_last=2)
    assert checkpoint.newest_valid(run)[0].state == state_of(4)
    assert names(run)[-1] == "update_00000004"
    assert not [name for name in names(run) if name.startswith(".")]


def a_failing_call_harms_nothing(folder: Path, number: int, asynchronous: bool) -> None:
    """Whichever file call of a save fails: it is published or not, as it says, and what was published stays whole."""
    failed = noted = 0
    for at in range(1, calls_of_a_save(folder) + 1):
        run = folder / str(at)
        two_saved(run)
        with sabotage(at, failing(number)):
            ended = attempt(run, 3, asynchronous=asynchronous, keep_last=2)
        found, skipped = checkpoint.newest_valid(run)
        assert (found.state, skipped) == (state_of(3 if ended.published else 2), []), at
        latest_names_a_whole_one(run)
        assert ended.problem.startswith(("" if ended.published else "rank 0: ") + os.strerror(number)) or (
            ended.published and not ended.problem  # making a folder that is there already may fail
        ), at
        failed += not ended.published
        noted += ended.published and bool(ended.problem)
        goes_on(run)
    assert failed >= 12
    assert noted >= 8


def a_kill_at_any_call_harms_nothing(folder: Path, asynchronous: bool) -> None:
    """Killed without warning at whichever file call, the newest checkpoint is the one before, or the new one, whole."""
    for at in range(1, calls_of_a_save(folder) + 1):
        run = folder / str(at)
        two_saved(run)
        child = os.fork()
        if child == 0:
            with sabotage(at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                attempt(run, 3, asynchronous=asynchronous, keep_last=2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        found, skipped = checkpoint.newest_valid(run)
        assert found.state in (state_of(2), state_of(3)), at
        assert skipped == []
        latest_names_a_whole_one(run)
        goes_on(run)
