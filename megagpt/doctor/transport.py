"""Connections to agents, which run on another host (over ssh), on this host, or in a running rank (over a socket)."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megagpt.cluster import Rank, secret, tcp
from megagpt.cluster.handshake import Channel
from megagpt.cluster.tcp import Endpoint
from megagpt.doctor import agent
from megagpt.doctor.agent import PREFIX
from megagpt.doctor.report import ERROR, Finding
from megagpt.errors import UserError
from megagpt.files import parse_json

# Steps that may compile operators have a time limit that is longer by this factor.
COMPILE_FACTOR = 10
_SSH_CONNECT = 10  # time limit for ssh to connect, in seconds
_HELLO = 5.0  # time limit for a connected rank to identify itself, in seconds
# Exit codes of the remote command line. The last one is that of ssh itself.
_NO_FOLDER, _NO_PYTHON, _SSH_FAILED = 101, 102, 255
# Prefixes of the variables that DeepSpeed forwards (deepspeed/launcher/runner.py).
_FORWARDED_BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


class HostLost(Exception):
    """Raised if a host no longer answers. `finding` contains the reason."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.what)
        self.finding = finding


class AgentConnection:
    """Connection to the agent on one host.

    Args:
        source: Lines that the agent sends.
        send: Function that sends a line to the agent.
        host: Name of the host, for messages.
        explain_end: Function that returns a finding with the reason why the agent has ended.
        close: Function that closes the connection and ends processes that were started for it.
    """

    def __init__(
        self,
        source: Iterable[str],
        send: Callable[[str], object],
        host: str,
        explain_end: Callable[[], Finding],
        close: Callable[[], None],
    ) -> None:
        self.host = host
        self.close = close
        self._send, self._explain_end = send, explain_end
        # Messages from the agent, followed by None when the agent has ended.
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, args=(source,), daemon=True).start()

    def request(self, name: str, limit: float, /, **arguments: Any) -> dict[str, Any]:
        """Send a request to the agent and wait for its result.

        Args:
            name: One of `agent.REQUESTS`.
            limit: Time to wait for the result, in seconds.
            arguments: Arguments of the request.

        Returns:
            The result of the request.

        Raises:
            HostLost: No result arrived within `limit` seconds, or the agent has ended.
        """
        step, end = name, time.monotonic() + limit
        try:
            self._send(f"{PREFIX}{json.dumps({'request': name, **arguments})}\n")
            while (message := self._messages.get(timeout=max(end - time.monotonic(), 0))) is not None:
                if "result" in message:
                    return dict(message["result"])
                step = message["doing"]
        except queue.Empty:
            what = f"no answer within {limit:.0f} s, at step: {step}"
            do = f"look on {self.host} for what hangs: a network disk, a driver (`dmesg`), a stuck process"
            raise HostLost(_connection_error(self.host, what, do)) from None
        except OSError:
            pass
        raise HostLost(self._explain_end())

    def _read(self, source: Iterable[str]) -> None:
        # The connection may be reset or closed, or a line may not be a JSON object.
        with contextlib.suppress(OSError, ValueError, TypeError):
            for line in source:
                if line.startswith(PREFIX):
                    self._messages.put(dict(parse_json(line[len(PREFIX) :])))
        self._messages.put(None)


def agent_lifetime(limit: float) -> float:
    """Return the number of seconds after which an agent exits by itself if its connection has not been closed before.

    Args:
        limit: Time limit per step, in seconds.
    """
    return limit * (5 + 2 * COMPILE_FACTOR)


def start_local_agent() -> AgentConnection:
    """Start an agent on this host, and return the connection to it."""
    return _start([sys.executable, "-m", "megagpt", "host-agent"], socket.gethostname())


def start_agent_over_ssh(host: str, env: Mapping[str, str]) -> AgentConnection:
    """Start an agent on another host, and return the connection to it.

    The agent has the same Python, folder and environment variables that `deepspeed` would give to the ranks there.

    Args:
        host: Name of the host, as in the hostfile.
        env: Environment of this process.
    """
    folder, python = os.getcwd(), sys.executable
    variables = " ".join(
        f"{name}={shlex.quote(value)}" for name, value in variables_forwarded_by_deepspeed(env).items()
    )
    command = (
        f"cd {shlex.quote(folder)} 2>/dev/null || exit {_NO_FOLDER}; "
        f"[ -x {shlex.quote(python)} ] || exit {_NO_PYTHON}; "
        f"exec env {variables} {shlex.quote(python)} -m megagpt host-agent"
    )
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SSH_CONNECT}", *pdsh_ssh_options(env)]
    return _start(["ssh", *options, host, command], host)


def variables_forwarded_by_deepspeed(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that DeepSpeed's launcher sets on other hosts.

    It forwards variables of `env` with certain prefixes, and reads further variables from its environment file.
    """
    found = {name: value for name, value in env.items() if name.startswith(_FORWARDED_BY_DEEPSPEED)}
    found["PYTHONPATH"] = ":".join(filter(None, (os.getcwd(), env.get("PYTHONPATH", ""))))
    for folder in (Path.home(), Path(".")):
        file = folder / env.get("DS_ENV_FILE", ".deepspeed_env")
        if file.is_file():
            found |= dict(line.split("=", 1) for line in file.read_text().splitlines() if "=" in line)
    return found


def pdsh_ssh_options(env: Mapping[str, str]) -> list[str]:
    """Return the options that pdsh adds to its calls of ssh."""
    return shlex.split(env.get("PDSH_SSH_ARGS_APPEND", ""))


def _start(command: Sequence[str], host: str) -> AgentConnection:
    errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", bufsize=1
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    def explain_end() -> Finding:
        code = process.wait()
        errors.seek(0)
        return explain_exit(host, code, ([""] + [line.strip() for line in errors if line.strip()])[-1])

    def close() -> None:
        process.kill()
        process.wait()
        for stream in (stdin, stdout, errors):
            with contextlib.suppress(OSError):  # The buffer may hold a request that the agent has not read.
                stream.close()

    return AgentConnection(stdout, stdin.write, host, explain_end, close)


def _connection_error(host: str, what: str, do: str) -> Finding:
    return Finding("connection", ERROR, what, do, (host,))


_EXITS = (
    (_NO_FOLDER, "", "code", "the folder {folder} does not exist",
     "mount it or copy it to the same path: DeepSpeed starts the ranks there"),
    (_NO_PYTHON, "", "python", "there is no Python at {python}",
     "install the same environment at the same path: DeepSpeed starts the ranks with it"),
    (None, "No module named", "code", "megagpt cannot be imported: {error}",
     "install megagpt there, or copy it to {folder}"),
    (_SSH_FAILED, "Permission denied", "connection", "ssh failed: {error}",
     "allow login without a password: `ssh-copy-id {host}`"),
    (_SSH_FAILED, "Host key verification failed", "connection", "ssh failed: {error}",
     "add the host's key: `ssh-keyscan {host} >> ~/.ssh/known_hosts`"),
    (_SSH_FAILED, "Could not resolve", "connection", "ssh failed: {error}",
     "correct the name in the hostfile, or add it to DNS or /etc/hosts"),
    (_SSH_FAILED, "", "connection", "ssh failed: {error}",
     "check that {host} is up, runs sshd, and is not behind a firewall: `ssh {host} true` must work"),
    (None, "", "connection", "the doctor's agent exited with code {code}: {error}",
     "run `python -m megagpt host-agent` there by hand, and fix what it reports"),
)  # fmt: skip
"""Rows of exit code (None for any), part of the last line of standard error, and check, what and do of a finding.

The first row that matches is used.
"""


def explain_exit(host: str, code: int, error: str) -> Finding:
    """Return a finding with the reason why the agent of a host, or the ssh process that started it, has ended.

    Args:
        host: Name of the host.
        code: Exit code of the agent, of ssh, or of the command line that ssh ran.
        error: Last line of standard error.
    """
    values = {"host": host, "code": code, "error": error or "no reason given", "folder": os.getcwd(),
              "python": sys.executable}  # fmt: skip
    check, what, do = next(row[2:] for row in _EXITS if row[0] in (None, code) and row[1] in error)
    return Finding(check, ERROR, what.format(**values), do.format(**values), (host,))


def channel_lines(channel: Channel) -> tuple[Iterator[str], Callable[[str], None]]:
    """Return an iterator over the lines that a channel receives until it closes, and a function that sends a line."""

    def receive() -> Iterator[str]:
        with contextlib.suppress(EOFError, OSError):
            while True:
                yield channel.receive().decode("utf-8", "replace")

    return receive(), lambda line: channel.send(line.encode("utf-8", "surrogateescape"))


def connection_to_rank(channel: Channel, host: str) -> AgentConnection:
    """Return the connection to the agent in a rank, over the channel that the rank has opened."""
    ended = _connection_error(host, "the rank has ended", "see its log")
    return AgentConnection(*channel_lines(channel), host, lambda: ended, channel.close)


def _endpoint(rank: Rank, env: Mapping[str, str]) -> Endpoint:
    """Return the endpoint to which the doctor's ranks connect.

    It uses the port after MASTER_PORT, because a launcher may already listen on MASTER_PORT itself. It does not use
    torch's store, so that the report also arrives from a host on which torch is broken.
    """
    if not rank.address or not rank.port:
        raise UserError(
            f"{rank.launcher} started {rank.world_size} ranks, but the address of rank 0 is not known",
            "MASTER_ADDR, MASTER_PORT",
            "export MASTER_ADDR=HOST_OF_RANK_0 and MASTER_PORT=PORT to all ranks (mpirun -x, -genv)",
        )
    return Endpoint(rank, rank.port + 1, "doctor", secret.state_folder(env), secret.from_environment(env))


def serve_as_rank(rank: Rank, limit: float, env: Mapping[str, str]) -> None:
    """Connect to rank 0 and act as the doctor's agent on this rank.

    Args:
        rank: This rank.
        limit: Time limit to connect to rank 0, in seconds.
        env: Environment of this process.

    Raises:
        MachineError: Rank 0 does not answer within `limit` seconds.
    """
    channel = tcp.connect(_endpoint(rank, env), limit)
    try:
        agent.serve(*channel_lines(channel), rank=rank.rank, local_rank=rank.local_rank)
    finally:
        channel.close()


def accept_ranks(rank: Rank, limit: float, env: Mapping[str, str]) -> dict[int, tuple[str, int, AgentConnection]]:
    """Wait on rank 0 until all other ranks have connected.

    Args:
        rank: This rank.
        limit: Time to wait, in seconds.
        env: Environment of this process.

    Returns:
        Host, local rank and connection of each rank that has connected, keyed by rank. Rank 0 is included.

    Raises:
        MachineError: The port is in use, or the key of the job cannot be written.
    """
    ranks: dict[int, tuple[str, int, AgentConnection]] = {}
    ranks[0] = (socket.gethostname(), rank.local_rank, start_local_agent())
    with tcp.listen(_endpoint(rank, env), limit) as callers:
        while len(ranks) < rank.world_size and (caller := next(callers, None)):
            number, channel = caller
            connection = connection_to_rank(channel, f"rank {number}")
            try:
                identity = connection.request("hello", _HELLO, limit=agent_lifetime(limit))
            except HostLost:
                identity = {}
            host, local_rank = identity.get("host"), identity.get("local_rank")
            if not isinstance(host, str) or not isinstance(local_rank, int):
                connection.close()
                continue
            connection.host = host
            if number in ranks:  # The rank has connected again after its first connection was interrupted.
                ranks[number][2].close()
            ranks[number] = (host, local_rank, connection)
    return ranks
