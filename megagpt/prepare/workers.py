"""Worker processes that process chunks, and the handling of workers that fail or die."""

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

# Each worker is a new interpreter, because this process may have threads, and forking such a process is not safe.
_SPAWN = multiprocessing.get_context("spawn")

_R = TypeVar("_R")

if TYPE_CHECKING:
    Pipe = Connection[Any, Any]  # Connection is not generic at run time


class ChunkTask(NamedTuple):
    """Chunk to process, with an additional argument for the worker."""

    chunk: Chunk
    argument: Any = None


WorkerFactory = Callable[[], Callable[[ChunkTask, ProgressCallback], _R]]
"""Function that is called once in each worker. It returns the function that the worker calls for every task."""


def encode_chunks(job: EncodeJob, chunks: Sequence[Chunk], workers: int, report: ProgressCallback) -> list[ShardRecord]:
    """Encode chunks to shards, in this process or in several workers. After a failure, no new chunk is started.

    Args:
        job: The settings for encoding the chunks.
        chunks: The chunks to encode.
        workers: The maximum number of processes.
        report: The function that receives the progress.

    Returns:
        The records of the shards, in the order in which the chunks were completed.

    Raises:
        ChunkError: A chunk failed. If several chunks failed, the error is that of the chunk with the lowest number.
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
        create: The function that creates a worker's function for tasks. It is called once in each worker.
        tasks: The tasks. The next task is taken from the iterable when a worker is idle.
        workers: The number of processes. With 1, the tasks run in this process. With 0, no task is run.
        report: The function that receives the progress.

    Raises:
        ChunkError: A chunk failed. If several chunks failed, the error is that of the chunk with the lowest number.
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
    """Return the next message of a worker, which is its progress, a result or a ChunkError.

    If the worker died, return a ChunkError.
    """
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
    """Start worker processes, and yield a dict from each connection to its process.

    The processes are terminated at the end of the `with` block.
    """
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
    # Ctrl-C sends SIGINT to the workers as well, but the command terminates them itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
            else:  # other exceptions might not be picklable, and their traceback would be lost
                connection.send(ChunkError(task.chunk.number, RuntimeError(traceback.format_exc())))


def _exit_with_parent() -> None:
    """Exit as soon as the parent process ends, even if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
