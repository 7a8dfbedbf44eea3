"""Worker processes that encode pieces, and what happens when one fails or dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from megagpt.data.oddities import LocatedError
from megagpt.data.pieces import Chunk
from megagpt.data.shards import ShardRecord
from megagpt.errors import MachineError, UserError
from megagpt.prepare.encoding import ChunkEncoder, ChunkError, EncodeJob, ProgressCallback

# A new interpreter each: this process may have threads, which a fork does not survive.
_SPAWN = multiprocessing.get_context("spawn")

_R = TypeVar("_R")
WorkerFactory = Callable[[], Callable[[Any, ProgressCallback], Any]]

if TYPE_CHECKING:
    Pipe = Connection[Any, Any]  # a plain class when it runs


class ChunkTask(NamedTuple):
    """A piece, and what else whoever works on it is given."""

    piece: Chunk
    given: Any = None


def encode_chunks(job: EncodeJob, pieces: Sequence[Chunk], workers: int, report: ProgressCallback) -> list[ShardRecord]:
    """Encode the pieces, in this process or in several, and return their records in any order.

    After a failure no new piece is begun. Raises ChunkError for the first piece, in their order, that failed.
    """
    return list(run_tasks(partial(_encoding, job), map(ChunkTask, pieces), min(workers, len(pieces)), report))


def _encoding(job: EncodeJob) -> Callable[[ChunkTask, ProgressCallback], ShardRecord]:
    encoder = ChunkEncoder(job)
    return lambda task, report: encoder.encode(task.piece, report)


def run_tasks(
    make: Callable[[], Callable[[ChunkTask, ProgressCallback], _R]],
    tasks: Iterable[ChunkTask],
    workers: int,
    report: ProgressCallback,
) -> Iterator[_R]:
    """What comes of each task, as it comes; a task is asked for when somebody is there to do it.

    Each worker calls `make` once, and what that gives for every task. Fails as `encode_chunks` does.
    """
    if workers <= 1:
        work = make() if workers else None
        yield from (work(task, report) for task in tasks if work)
        return
    failures: list[ChunkError] = []
    waiting = iter(tasks)
    with _started(make, workers) as pool:
        busy: dict[Pipe, Chunk] = {}
        idle = list(pool)
        while True:
            while idle and not failures and (task := next(waiting, None)):
                busy[idle[-1]] = task.piece
                idle.pop().send(task)
            if not busy:
                break
            for connection in cast("list[Pipe]", wait(list(busy))):
                message = _received(connection, busy[connection], pool[connection])
                if isinstance(message, tuple):
                    report(*message)
                    continue
                del busy[connection]
                if isinstance(message, ChunkError):
                    failures.append(message)
                else:
                    idle.append(connection)
                    yield message
    if failures:
        raise min(failures, key=lambda failure: failure.number)


def _received(connection: Pipe, piece: Chunk, process: SpawnProcess) -> Any:
    """What the worker says; that it died is a ChunkError."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        do = "type the command again (`prepare` goes on where it stopped); if memory was short, with fewer --workers"
        return ChunkError(piece.number, MachineError(f"a worker died ({how}) at this input", str(piece), do))


@contextmanager
def _started(make: WorkerFactory, count: int) -> Iterator[dict[Pipe, SpawnProcess]]:
    """Worker processes by the connection to each, ended with the block."""
    pool: dict[Pipe, SpawnProcess] = {}
    try:
        for _ in range(count):
            ours, theirs = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_work, args=(theirs, make), daemon=True)
            process.start()
            theirs.close()
            pool[ours] = process
        yield pool
    finally:
        for connection, process in pool.items():
            connection.close()
            process.terminate()
            process.join()


def _work(connection: Pipe, make: WorkerFactory) -> None:
    """The life of a worker: a task comes, what it gives goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the command ends its workers
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    work = make()
    while True:
        try:
            task: ChunkTask = connection.recv()
        except EOFError:
            return
        try:
            connection.send(work(task, lambda *counts: connection.send(counts)))
        except ChunkError as error:
            known = isinstance(error.cause, UserError | LocatedError)
            connection.send(error if known else ChunkError(task.piece.number, RuntimeError(traceback.format_exc())))


def _end_with_the_command() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
