"""Rank 0 listens, the other processes of the job call it, and both ends prove that they are of one job.

Plain sockets: the ranks of `megagpt doctor` must reach rank 0 even where torch is broken, and `prepare` needs no torch.
Also the error messages of whatever goes wrong there, the same for torch's rendezvous.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megagpt.cluster import handshake, secret
from megagpt.cluster.handshake import Channel
from megagpt.cluster.launch_env import Rank
from megagpt.cluster.reachability import own_address
from megagpt.cluster.secret import JobKey
from megagpt.errors import MachineError

_PAUSE = 0.1  # seconds between two calls
_CONNECT = 10.0  # seconds for one attempt to connect
_PROOF = 5.0  # seconds in which a caller proves that it is of this job
_ANSWER = 30.0  # seconds in which rank 0 answers
_FEWEST_PENDING = 64  # unproven callers served at a time; beyond that, the one that has waited longest is dropped
OTHER_PORT = "give this job another port: `deepspeed --master_port`, `torchrun --master_port`, or MASTER_PORT"


@dataclass(frozen=True)
class Door:
    """Where the processes of a job meet: with the secret of the environment, or else with the key file.

    Args:
        rank: This process.
        port: Port on which rank 0 listens. If it is in use, rank 0 chooses another and writes it into the key file.
        purpose: Command that meets here; two commands of one job have different keys.
        folder: Folder of the key file, which all hosts of the job see.
        given: The secret of the environment, None if there is none.
    """

    rank: Rank
    port: int
    purpose: str
    folder: Path
    given: bytes | None

    @property
    def file(self) -> Path:
        """The key file."""
        return self.folder / secret.file_name(self.purpose, self.rank.job, self.port)

    def key(self, of_job: bytes) -> bytes:
        """Derive this meeting's key from the secret of the job."""
        context = f"{self.rank.job}\0{self.rank.world_size}"
        return handshake.derive(of_job, self.purpose.encode(), context.encode())


def call(door: Door, limit: float) -> Channel:
    """Connect to rank 0, which may not listen yet.

    Args:
        door: Where rank 0 listens, and this process.
        limit: Seconds after which to give up.

    Returns:
        The channel to rank 0, which has proved that it is of this job.

    Raises:
        MachineError: Rank 0 was not found within `limit`, or another program listens there.
    """
    end = time.monotonic() + limit
    while True:
        where = JobKey(door.given, door.rank.address, door.port) if door.given else secret.find(door.file)
        if isinstance(where, str):
            error = _no_key(door, where, limit)
        else:
            try:
                return _called(door, where, end)
            except handshake.Rejected:
                error = _stranger(door, where)
                if door.given:
                    raise error from None
            except (OSError, EOFError) as reason:
                at = f"{where.address}:{where.port}"
                error = _unreachable(door.rank, at, f"{reason}, for {limit:g} s")
        if time.monotonic() >= end:
            raise error
        time.sleep(_PAUSE)


def _called(door: Door, where: JobKey, end: float) -> Channel:
    left = max(end - time.monotonic(), _PAUSE)
    connection = socket.create_connection((where.address, where.port), timeout=min(left, _CONNECT))
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        proof_end = time.monotonic() + min(max(left, 1.0), _ANSWER)
        return handshake.prove(connection, door.key(where.secret), door.rank.rank, proof_end)
    except BaseException:
        handshake.close(connection)
        raise


@contextlib.contextmanager
def callers(door: Door, limit: float) -> Iterator[Iterator[tuple[int, Channel]]]:
    """Listen on rank 0 for the other processes of the job.

    Strangers are heard side by side with them, each for a limited time, and can neither delay nor replace them.

    Args:
        door: Where to listen.
        limit: Seconds after which no more callers are yielded.

    Yields:
        Iterator of the callers that have proved to be of this job: number and channel, in the order in which they
        come. A process that calls twice is yielded twice; the later channel is the one it uses.

    Raises:
        MachineError: Rank 0 cannot listen, or cannot write the key file.
    """
    end = time.monotonic() + limit
    server = _listen(door)
    of_job = door.given or secrets.token_bytes(32)
    reception = _Reception(server, door.key(of_job), door.rank.world_size)
    try:
        if not door.given:
            address, port = server.getsockname()[:2]
            secret.publish(door.file, JobKey(of_job, address, port))
        reception.start()
        yield reception.proven_until(end)
    finally:
        reception.close()
        if not door.given:
            secret.remove(door.file)


class _Reception:
    """Hears each caller on a thread of its own until it has proved itself, a limited number at a time."""

    def __init__(self, server: socket.socket, key: bytes, size: int) -> None:
        self._server, self._key, self._size = server, key, size
        self._most = max(_FEWEST_PENDING, 2 * size)
        self._pending: dict[socket.socket, None] = {}  # in the order in which they came
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._proven: queue.Queue[tuple[int, Channel]] = queue.Queue()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def start(self) -> None:
        """Start to accept callers."""
        self._thread.start()

    def proven_until(self, end: float) -> Iterator[tuple[int, Channel]]:
        """Yield callers that have proved themselves, until the clock (`time.monotonic`) shows `end`."""
        while (left := end - time.monotonic()) > 0:
            try:
                yield self._proven.get(timeout=left)
            except queue.Empty:
                return

    def close(self) -> None:
        """Stop listening, and close the connections that nobody has taken."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._server.close()
        with self._lock:
            pending = list(self._pending)
        for connection in pending:
            handshake.close(connection)
        with contextlib.suppress(queue.Empty):
            while True:
                self._proven.get_nowait()[1].close()

    def _accept(self) -> None:
        self._server.settimeout(_PAUSE)
        while not self._closed.is_set():
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                continue
            except OSError:  # too many open files, or a caller that has gone already
                time.sleep(_PAUSE)
                continue
            with self._lock:
                oldest = next(iter(self._pending)) if len(self._pending) >= self._most else None
                if oldest:
                    del self._pending[oldest]
                self._pending[connection] = None
            if oldest:
                handshake.close(oldest)
            threading.Thread(target=self._hear, args=(connection,), daemon=True).start()

    def _hear(self, connection: socket.socket) -> None:
        proven = None
        with contextlib.suppress(OSError, EOFError, handshake.Rejected):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            proven = handshake.accept(connection, self._key, self._size, time.monotonic() + _PROOF)
        with self._lock:
            dropped = connection not in self._pending
            self._pending.pop(connection, None)
        if proven and not dropped:
            self._proven.put(proven)
        else:
            handshake.close(connection)


def _listen(door: Door) -> socket.socket:
    """Listen at the job's address only; on another port than the job's if that one is in use and can be published."""
    ports = (door.port,) if door.given else (door.port, 0)
    for port in ports:
        try:
            return _bound(door.rank, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == ports[-1]:
                raise not_free(door.rank, port, os.strerror(error.errno or 0)) from None
    raise AssertionError


def _bound(rank: Rank, port: int) -> socket.socket:
    """Listen on a port of the address by which the other processes reach this host."""
    one_host = rank.local_world_size == rank.world_size or rank.address == "localhost"
    addresses = _resolved(rank.address)
    if not one_host and all(_is_loopback(address) and address != rank.address for _, address in addresses):
        addresses = _resolved(own_address())  # the host's own name is the loopback to itself, as on Debian
    backlog = max(128, rank.world_size)
    family, address = addresses[0]
    try:
        return socket.create_server((address, port), family=family, backlog=backlog)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
    family, address = _resolved(own_address())[0]  # the job's address is translated on its way to this host
    return socket.create_server((address, port), family=family, backlog=backlog)


def _resolved(name: str) -> list[tuple[socket.AddressFamily, str]]:
    """Return the addresses of a name, IPv4 first."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return sorted((entry[0], str(entry[4][0])) for entry in found)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def unreachable(rank: Rank, port: int, why: str) -> MachineError:
    """Rank 0 does not answer."""
    return _unreachable(rank, f"{rank.address}:{port}", why)


def _unreachable(rank: Rank, at: str, why: str) -> MachineError:
    return MachineError(
        f"rank {rank.rank} on {socket.gethostname()} could not reach rank 0 at {at}",
        why,
        "see whether rank 0 has ended, whether its host's name means the same here, and for a firewall",
    )


def _no_key(door: Door, why: str, limit: float) -> MachineError:
    """Rank 0 has not written a key file that this process can see and trust."""
    return MachineError(
        f"rank {door.rank.rank} on {socket.gethostname()} found no key of its job within {limit:g} s: {why}",
        str(door.file),
        f"see whether rank 0 has started; if hosts do not share this folder, {secret.SET}",
    )


def _stranger(door: Door, where: JobKey) -> MachineError:
    """Whoever listens does not have the secret of this job."""
    return MachineError(
        f"another program listens at {where.address}:{where.port}: it does not have the secret of this job"
        + (f" ({door.rank.job})" if door.rank.job else ""),
        f"rank {door.rank.rank}, launcher: {door.rank.launcher}",
        f"{OTHER_PORT}; all processes of a job need the same {secret.VARIABLE}",
    )


def not_free(rank: Rank, port: int, why: str) -> MachineError:
    """Rank 0 cannot listen."""
    used = "is in use on this host: by another job, or by what is left of an earlier one"
    return MachineError(
        f"port {port} {used if 'in use' in why else f'cannot be listened on: {why}'}",
        f"rank 0, launcher: {rank.launcher}, {_variable(rank, port)}",
        f"{OTHER_PORT}; `ss -ltnp` shows who listens",
    )


def two_jobs(rank: Rank, port: int, theirs: str, ours: str) -> MachineError:
    """Rank 0 of another job has answered."""
    return MachineError(
        f"two jobs share the port {port} of {rank.address}: {theirs} listens there, this is {ours}",
        f"rank {rank.rank}, launcher: {rank.launcher}",
        OTHER_PORT,
    )


def _variable(rank: Rank, port: int) -> str:
    return "MASTER_PORT" if port == rank.port else "the port after MASTER_PORT"
