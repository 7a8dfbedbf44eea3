"""Worker processes that encode pieces, and what happens when one fails or dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, Any, cast

from megagpt.data.oddities import AtPlace
from megagpt.data.pieces import Piece
from megagpt.data.shards import Record
from megagpt.errors import MachineError, UserError
from megagpt.prepare.encoding import Counts, Job, PieceEncoder, PieceError, Report

# A new interpreter each: this process may have threads, which a fork does not survive.
_SPAWN = multiprocessing.get_context("spawn")

if TYPE_CHECKING:
    Pipe = Connection[Any, Any]  # a plain class when it runs


def encode_all(job: Job, pieces: Sequence[Piece], workers: int, report: Report) -> list[Record]:
    """Encode the pieces, in this process or in several, and return their records in any order.

    After a failure no new piece is begun. Raises PieceError for the first piece, in their order, that failed.
    """
    if min(workers, len(pieces)) <= 1:
        encoder = PieceEncoder(job) if pieces else None
        return [encoder.encode(piece, report) for piece in pieces if encoder]
    records: list[Record] = []
    failures: list[PieceError] = []
    waiting = iter(pieces)
    with _started(job, min(workers, len(pieces))) as pool:
        busy: dict[Pipe, Piece] = {}
        idle = list(pool)
        while True:
            while idle and not failures and (piece := next(waiting, None)):
                busy[idle[-1]] = piece
                idle.pop().send(piece)
            if not busy:
                break
            for connection in cast("list[Pipe]", wait(list(busy))):
                message = _received(connection, busy[connection], pool[connection])
                if isinstance(message, tuple):
                    report(*message)
                elif isinstance(message, PieceError):
                    failures.append(message)
                    del busy[connection]
                else:
                    records.append(message)
                    del busy[connection]
                    idle.append(connection)
    if failures:
        raise min(failures, key=lambda failure: failure.number)
    return records


def _received(connection: Pipe, piece: Piece, process: SpawnProcess) -> Record | PieceError | Counts:
    """What the worker says; that it died is a PieceError."""
    try:
        message: Record | PieceError | Counts = connection.recv()
        return message
    except (EOFError, OSError):
        process.join()
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        do = "type the command again, it goes on where it stopped; if memory was short, with fewer --workers"
        return PieceError(piece.number, MachineError(f"a worker died ({how}) at this input", str(piece), do))


@contextmanager
def _started(job: Job, count: int) -> Iterator[dict[Pipe, SpawnProcess]]:
    """Worker processes by the connection to each, ended with the block."""
    pool: dict[Pipe, SpawnProcess] = {}
    try:
        for _ in range(count):
            ours, theirs = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_work, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            pool[ours] = process
        yield pool
    finally:
        for connection, process in pool.items():
            connection.close()
            process.terminate()
            process.join()


def _work(connection: Pipe, job: Job) -> None:
    """The life of a worker: a piece comes, its record goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the command ends its workers
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    encoder = PieceEncoder(job)
    while True:
        try:
            piece: Piece = connection.recv()
        except EOFError:
            return
        try:
            connection.send(encoder.encode(piece, lambda *counts: connection.send(counts)))
        except PieceError as error:
            known = isinstance(error.cause, UserError | AtPlace)
            connection.send(error if known else PieceError(piece.number, RuntimeError(traceback.format_exc())))


def _end_with_the_command() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
