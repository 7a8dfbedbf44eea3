"""Saves as the loop sees them: begun, perhaps written while training goes on, and ended.

There is one protocol, `Store.publishing`. A synchronous save goes through it at once. An asynchronous one first copies
the state to host memory, which is all that training waits for; then a thread does the file work of each step. That
thread never talks to other ranks: after every update all agree whether any is still `writing`, in the exchange that
decides on stopping anyway; when none is, they take the next step together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.checkpoint.store import Report, SaveFailed, Steps, Store, Work
from megagpt.files import WriteFile
from megagpt.state import TrainState


@dataclass(frozen=True)
class Attempt:
    """How a save ended: the same on every rank, but for the times.

    `problem` is why it was not published, or what went wrong after it was. `stall_seconds`: training stood still for
    it. `write_seconds`: this rank's file work.
    """

    state: TrainState
    folder: Path
    published: bool
    problem: str
    stall_seconds: float
    write_seconds: float


class Saver:
    """Publishes checkpoints of one engine, one at a time. All ranks call the same methods in the same order."""

    def __init__(
        self, store: Store, save_state: Callable[[WriteFile], None], facts: dict[str, Any], asynchronous: bool
    ) -> None:
        self._store, self._save_state, self._facts, self._asynchronous = store, save_state, facts, asynchronous
        self._executor: Executor = ThreadPoolExecutor(1, "saving") if asynchronous else _AtOnce()
        self._now: _UnderWay | None = None

    @property
    def writing(self) -> bool:
        """Whether this rank's file work keeps a save from its next step."""
        return self._now is not None and not self._now.work.done()

    def save(self, state: TrainState, wait: bool = False) -> Attempt | None:
        """Begin a checkpoint of this moment; how it ended, if it did: to be sure of that, `wait`.

        The save before must have ended.
        """
        assert self._now is None, "one save at a time"
        start = time.perf_counter()
        write = _copied(self._save_state) if self._asynchronous else self._save_state
        self._now = _UnderWay(state, self._store.publishing(state, write, self._facts))
        self._step(self._now, None)
        return self._stood_since(start, wait or not self._asynchronous)

    def proceed(self) -> Attempt | None:
        """Take the next step of a save under way; how it ended, if it did. To be called when no rank is `writing`."""
        start = time.perf_counter()
        if self._now is not None:
            self._step(self._now, self._now.work.result())
        return self._stood_since(start, wait=False)

    def finish(self) -> Attempt | None:
        """Wait for a save under way, on all ranks; how it ended, None if there was none."""
        return self._stood_since(time.perf_counter(), wait=True)

    def _stood_since(self, start: float, wait: bool) -> Attempt | None:
        """How the save ended, if it did; training has stood still for it since `start`."""
        now = self._now
        if now is None:
            return None
        while wait and not now.ended:
            self._step(now, now.work.result())
        now.stall_seconds += time.perf_counter() - start
        if not now.ended:
            return None
        self._now, folder = None, self._store.folder(now.state.update)
        return Attempt(now.state, folder, now.published, now.problem, now.stall_seconds, now.write_seconds)

    def _step(self, now: _UnderWay, report: Report | None) -> None:
        """Agree with all ranks on the step that this is the report of, and let the next one's work begin."""
        try:
            now.work = self._executor.submit(now.timed, now.steps.send(report) if report else next(now.steps))
        except StopIteration as end:
            now.ended, now.published, now.problem = True, True, end.value
        except SaveFailed as failed:
            now.ended, now.problem = True, str(failed)


@dataclass
class _UnderWay:
    """One save: its steps, the file work of the present one, and what has come of it."""

    state: TrainState
    steps: Steps
    work: Future[Report] = field(default_factory=Future)
    ended: bool = False
    published: bool = False
    problem: str = ""
    stall_seconds: float = 0.0
    write_seconds: float = 0.0

    def timed(self, work: Work) -> Report:
        """Do the work and count its seconds."""
        start = time.perf_counter()
        report = work()
        self.write_seconds += time.perf_counter() - start
        return report


class _AtOnce(Executor):
    """Does what it is given on the thread that gives it."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **words: Any) -> Future[Any]:
        """Do the work; its result is there."""
        done: Future[Any] = Future()
        done.set_result(work(*arguments, **words))
        return done


def _copied(save_state: Callable[[WriteFile], None]) -> Callable[[WriteFile], None]:
    """The state as it is now, in host memory: written later, each file is let go as soon as it is."""
    held: list[tuple[str, bytes]] = []
    save_state(lambda name, data: held.append((name, data)))

    def write(sink: WriteFile) -> None:
        while held:
            sink(*held.pop(0))

    return write
