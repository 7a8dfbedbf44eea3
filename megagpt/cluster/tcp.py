"""Authenticated TCP connections between rank 0, which listens, and the other processes of a job.

Both ends of a connection prove that they belong to the job. Plain sockets are used because the ranks of
`megagpt doctor` must reach rank 0 even if torch is broken, and because `megagpt prepare` does not need torch. The error
messages are shared with the rendezvous over torch's store.
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
from megagpt.cluster.reachability import own_address, resolves
from megagpt.cluster.secret import JobKey
from megagpt.errors import MachineError, UserError

_PAUSE = 0.1  # seconds between two attempts to connect
_CONNECT = 10.0  # time limit for one attempt to connect, in seconds
_PROOF = 5.0  # time limit for a caller to prove that it belongs to this job, in seconds
_ANSWER = 30.0  # time limit for the proof of rank 0, in seconds
# Minimum number of unproven callers that are served at the same time. If there are more, the oldest is dropped.
_MIN_PENDING = 64
USE_OTHER_PORT = "give this job another port: `deepspeed --master_port`, `torchrun --master_port`, or MASTER_PORT"


@dataclass(frozen=True)
class Endpoint:
    """Address at which the processes of a job connect to rank 0, and source of the job's secret.

    Args:
        rank: Rank of this process.
        port: Port on which rank 0 listens. If it is in use, rank 0 chooses another port and writes it into the key
            file.
        purpose: Name of the command whose processes connect. Two commands of one job have different keys.
        folder: Folder of the key file, which all hosts of the job must be able to read.
        env_secret: The secret from the environment; None if the key file is used.
    """

    rank: Rank
    port: int
    purpose: str
    folder: Path
    env_secret: bytes | None

    @property
    def key_file(self) -> Path:
        """Path of the key file."""
        return self.folder / secret.key_file_name(self.purpose, self.rank.job, self.port)

    def key(self, job_secret: bytes) -> bytes:
        """Derive the key of these connections from the secret of the job."""
        context = f"{self.rank.job}\0{self.rank.world_size}"
        return handshake.derive(job_secret, self.purpose.encode(), context.encode())


def connect(endpoint: Endpoint, limit: float) -> Channel:
    """Connect to rank 0, which may not be listening yet.

    Args:
        endpoint: Address of rank 0, and the rank of this process.
        limit: Time limit in seconds.

    Returns:
        The channel to rank 0, which has proved that it belongs to this job.

    Raises:
        MachineError: Rank 0 was not found within `limit`, or another program listens there.
        UserError: The address of rank 0 does not resolve.
    """
    if endpoint.env_secret:
        check_address(endpoint.rank)
    end = time.monotonic() + limit
    while True:
        where = (
            JobKey(endpoint.env_secret, endpoint.rank.address, endpoint.port)
            if endpoint.env_secret
            else secret.read_key(endpoint.key_file)
        )
        if isinstance(where, str):
            error = _no_key_file(endpoint, where, limit)
        else:
            try:
                return _connect_once(endpoint, where, end)
            except handshake.Rejected:
                error = _not_of_this_job(endpoint, where)
                if endpoint.env_secret:
                    raise error from None
            except (OSError, EOFError) as reason:
                at = f"{where.address}:{where.port}"
                error = _unreachable(endpoint.rank, at, f"{reason}, for {limit:g} s")
        if time.monotonic() >= end:
            raise error
        time.sleep(_PAUSE)


def _connect_once(endpoint: Endpoint, where: JobKey, end: float) -> Channel:
    left = max(end - time.monotonic(), _PAUSE)
    connection = socket.create_connection((where.address, where.port), timeout=min(left, _CONNECT))
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        proof_end = time.monotonic() + min(max(left, 1.0), _ANSWER)
        return handshake.prove(connection, endpoint.key(where.secret), endpoint.rank.rank, proof_end)
    except BaseException:
        handshake.close(connection)
        raise


@contextlib.contextmanager
def listen(endpoint: Endpoint, limit: float) -> Iterator[Iterator[tuple[int, Channel]]]:
    """Listen on rank 0 for the other processes of the job.

    All callers are served concurrently, each for a limited time. A caller that does not belong to the job can therefore
    neither delay nor replace one that does.

    Args:
        endpoint: Address at which to listen.
        limit: Time in seconds after which no more callers are yielded.

    Yields:
        Iterator over the number and channel of each caller that has proved that it belongs to this job, in the order
        of arrival. A process that connects twice is yielded twice and uses the later channel.

    Raises:
        MachineError: Rank 0 cannot listen, or cannot write the key file.
        UserError: The address of rank 0 does not resolve.
    """
    check_address(endpoint.rank)
    end = time.monotonic() + limit
    server = _listen(endpoint)
    job_secret = endpoint.env_secret or secrets.token_bytes(32)
    listener = _Listener(server, endpoint.key(job_secret), endpoint.rank.world_size)
    try:
        if not endpoint.env_secret:
            address, port = server.getsockname()[:2]
            secret.publish_key(endpoint.key_file, JobKey(job_secret, address, port))
        listener.start()
        yield listener.proven_until(end)
    finally:
        listener.close()
        if not endpoint.env_secret:
            secret.remove_key(endpoint.key_file)


class _Listener:
    """Serves each caller in a separate thread until the caller has proved that it belongs to the job."""

    def __init__(self, server: socket.socket, key: bytes, size: int) -> None:
        self._server, self._key, self._size = server, key, size
        self._most = max(_MIN_PENDING, 2 * size)
        # Connections of callers that have not proved anything yet, in the order of arrival.
        self._pending: dict[socket.socket, None] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._proven: queue.Queue[tuple[int, Channel]] = queue.Queue()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def start(self) -> None:
        """Start accepting callers."""
        self._thread.start()

    def proven_until(self, end: float) -> Iterator[tuple[int, Channel]]:
        """Yield callers that have proved that they belong to the job, until the time `end` (`time.monotonic`)."""
        while (left := end - time.monotonic()) > 0:
            try:
                yield self._proven.get(timeout=left)
            except queue.Empty:
                return

    def close(self) -> None:
        """Stop listening, and close the connections that were not yielded."""
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
            except OSError:  # There are too many open files, or the caller has disconnected.
                time.sleep(_PAUSE)
                continue
            with self._lock:
                oldest = next(iter(self._pending)) if len(self._pending) >= self._most else None
                if oldest:
                    del self._pending[oldest]
                self._pending[connection] = None
            if oldest:
                handshake.close(oldest)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
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


def _listen(endpoint: Endpoint) -> socket.socket:
    """Return a socket that listens on the job's address only.

    If the port is in use and the job has a key file, any free port is used, because the key file can publish it.
    """
    ports = (endpoint.port,) if endpoint.env_secret else (endpoint.port, 0)
    for port in ports:
        try:
            return _listen_on_address(endpoint.rank, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == ports[-1]:
                raise port_in_use(endpoint.rank, port, os.strerror(error.errno or 0)) from None
    raise AssertionError


def _listen_on_address(rank: Rank, port: int) -> socket.socket:
    """Return a socket that listens on the address by which the other processes reach this host."""
    one_host = rank.local_world_size == rank.world_size or rank.address == "localhost"
    addresses = _addresses_of(rank.address)
    if not one_host and all(_is_loopback(address) and address != rank.address for _, address in addresses):
        addresses = _addresses_of(own_address())  # On Debian, the host's own name resolves to the loopback.
    backlog = max(128, rank.world_size)
    family, address = addresses[0]
    try:
        return socket.create_server((address, port), family=family, backlog=backlog)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
    # This host does not have the job's address itself, because the address is translated (NAT) on the way.
    family, address = _addresses_of(own_address())[0]
    return socket.create_server((address, port), family=family, backlog=backlog)


def _addresses_of(name: str) -> list[tuple[socket.AddressFamily, str]]:
    """Return the addresses to which a name resolves, IPv4 first."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return sorted((entry[0], str(entry[4][0])) for entry in found)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def check_address(rank: Rank) -> None:
    """Raise UserError if the address of rank 0 does not resolve.

    The check is skipped under Kubernetes, because the name of a pod does not resolve before the pod has started.
    """
    if not resolves(rank.address) and "KUBERNETES_SERVICE_HOST" not in os.environ:
        raise UserError(
            f"the address of rank 0 does not resolve on {socket.gethostname()}: {rank.address}",
            f"MASTER_ADDR, launcher: {rank.launcher}",
            "correct the name, or add it to DNS or /etc/hosts",
        )


def rank_0_unreachable(rank: Rank, port: int, why: str) -> MachineError:
    """Return the error for the case that rank 0 does not answer."""
    return _unreachable(rank, f"{rank.address}:{port}", why)


def _unreachable(rank: Rank, at: str, why: str) -> MachineError:
    return MachineError(
        f"rank {rank.rank} on {socket.gethostname()} could not reach rank 0 at {at}",
        why,
        "check whether rank 0 has ended, whether its host's name resolves to the same address here, and for a firewall",
    )


def _no_key_file(endpoint: Endpoint, why: str, limit: float) -> MachineError:
    """Return the error for a key file that is missing or cannot be trusted."""
    return MachineError(
        f"rank {endpoint.rank.rank} on {socket.gethostname()} found no key file of its job within {limit:g} s: {why}",
        str(endpoint.key_file),
        f"check whether rank 0 has started; if hosts do not share this folder, {secret.HOW_TO_SET}",
    )


def _not_of_this_job(endpoint: Endpoint, where: JobKey) -> MachineError:
    """Return the error for the case that the listening program does not know the secret of this job."""
    return MachineError(
        f"another program listens at {where.address}:{where.port}: it does not have the secret of this job"
        + (f" ({endpoint.rank.job})" if endpoint.rank.job else ""),
        f"rank {endpoint.rank.rank}, launcher: {endpoint.rank.launcher}",
        f"{USE_OTHER_PORT}; all processes of a job need the same {secret.VARIABLE}",
    )


def port_in_use(rank: Rank, port: int, why: str) -> MachineError:
    """Return the error for a port on which rank 0 cannot listen."""
    used = "is in use on this host, by another job or by processes left from an earlier one"
    return MachineError(
        f"port {port} {used if 'in use' in why else f'cannot be listened on: {why}'}",
        f"rank 0, launcher: {rank.launcher}, {_port_variable(rank, port)}",
        f"{USE_OTHER_PORT}; `ss -ltnp` shows which program listens",
    )


def port_shared_by_jobs(rank: Rank, port: int, theirs: str, ours: str) -> MachineError:
    """Return the error for a port on which rank 0 of another job listens."""
    return MachineError(
        f"two jobs share the port {port} of {rank.address}: {theirs} listens there, this is {ours}",
        f"rank {rank.rank}, launcher: {rank.launcher}",
        USE_OTHER_PORT,
    )


def _port_variable(rank: Rank, port: int) -> str:
    return "MASTER_PORT" if port == rank.port else "the port after MASTER_PORT"
