"""Worker processes that process chunks, and the errors of workers that fail or die."""

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

from megagpt.errors import MachineError, UserError
from megagpt.prepare.chunks import Chunk
from megagpt.prepare.encode import ChunkEncoder, ChunkError, EncodeJob, ProgressCallback
from megagpt.prepare.input_warnings import LocatedError
from megagpt.prepare.shards import ShardRecord

# Each worker is a new interpreter, since this process may have threads, with which a fork is not safe.
_SPAWN = multiprocessing.get_context("spawn")

_R = TypeVar("_R")

if TYPE_CHECKING:
    Pipe = Connection[Any, Any]  # not generic at run time


class ChunkTask(NamedTuple):
    """A chunk to process, and a further argument."""

    chunk: Chunk
    argument: Any = None


WorkerFactory = Callable[[], Callable[[ChunkTask, ProgressCallback], _R]]
"""Called once per worker; returns the function that the worker calls for every task."""


def encode_chunks(job: EncodeJob, chunks: Sequence[Chunk], workers: int, report: ProgressCallback) -> list[ShardRecord]:
    """Encode chunks to shards, in this process or in several workers. After a failure no new chunk is started.

    Args:
        job: How they are encoded.
        chunks: The chunks.
        workers: The largest number of processes.
        report: Receives the progress.

    Returns:
        The records of the shards, in any order.

    Raises:
        ChunkError: Chunks failed; the error is that of the first one, by number.
    """
    tasks = map(ChunkTask, chunks)
    return list(run_tasks(partial(_create_encoder, job), tasks, min(workers, len(chunks)), report))


def _create_encoder(job: EncodeJob) -> Callable[[ChunkTask, ProgressCallback], ShardRecord]:
    encoder = ChunkEncoder(job)
    return lambda task, report: encoder.encode(task.chunk, report)


def run_tasks(
    create: WorkerFactory[_R], tasks: Iterable[ChunkTask], workers: int, report: ProgressCallback
) -> Iterator[_R]:
    """Yield the results of tasks, in the order in which they complete.

    Args:
        create: Called once in each worker; the function that it returns is called for every task.
        tasks: The tasks; the next one is taken when a worker is idle.
        workers: Number of processes. With 1, the tasks run in this process; with 0, nothing runs.
        report: Receives the progress.

    Raises:
        ChunkError: Chunks failed; the error is that of the first one, by number.
    """
    if workers <= 1:
        if workers:
            work = create()
            yield from (work(task, report) for task in tasks)
        return
    failures: list[ChunkError] = []
    waiting = iter(tasks)
    with _start_workers(create, workers) as pool:
        busy: dict[Pipe, Chunk] = {}
        idle = list(pool)
        while True:
            while idle and not failures and (task := next(waiting, None)):
                busy[idle[-1]] = task.chunk
                idle.pop().send(task)
            if not busy:
                break
            for connection in cast("list[Pipe]", wait(list(busy))):
                message = _receive(connection, busy[connection], pool[connection])
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


def _receive(connection: Pipe, chunk: Chunk, process: SpawnProcess) -> Any:
    """Return the next message of a worker: progress, a result, or a ChunkError, also if the worker died."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        do = "run the command again (`prepare` resumes where it stopped), with fewer --workers if memory was low"
        error = MachineError(f"a worker died ({how}) while processing this input", str(chunk), do)
        return ChunkError(chunk.number, error)


@contextmanager
def _start_workers(create: WorkerFactory[Any], count: int) -> Iterator[dict[Pipe, SpawnProcess]]:
    """Start worker processes, and return them by the connection to each. They are terminated with the `with` block."""
    pool: dict[Pipe, SpawnProcess] = {}
    try:
        for _ in range(count):
            ours, theirs = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_run_worker, args=(theirs, create), daemon=True)
            process.start()
            theirs.close()
            pool[ours] = process
        yield pool
    finally:
        for connection, process in pool.items():
            connection.close()
            process.terminate()
            process.join()


def _run_worker(connection: Pipe, create: WorkerFactory[Any]) -> None:
    """Receive tasks and send their results until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the command terminates its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    work = create()
    while True:
        try:
            task: ChunkTask = connection.recv()
        except EOFError:
            return
        try:
            connection.send(work(task, lambda *counts: connection.send(counts)))
        except ChunkError as error:
            if isinstance(error.cause, UserError | LocatedError):
                connection.send(error)
            else:  # other exceptions may not be picklable, and would lose their traceback
                connection.send(ChunkError(task.chunk.number, RuntimeError(traceback.format_exc())))


def _exit_with_parent() -> None:
    """Exit as soon as the command does, also if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
