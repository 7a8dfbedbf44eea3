"""How the doctor talks with its part on a host: through ssh, a process of its own, or a socket; with time limits."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megagpt.distributed.handshake import Channel
from megagpt.doctor.agent import MARK, Sink
from megagpt.doctor.finding import BAD, Finding
from megagpt.files import parse_json

_CONNECT = 10  # seconds for a host to answer ssh at all
_NO_FOLDER, _NO_PYTHON = 101, 102
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # by DeepSpeed's launcher, whatever else is set


class Lost(Exception):
    """A host that says no more: what was found of it."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.what)
        self.finding = finding


class Link:
    """One host: orders go out by `sink`, answers come in by `source`, a line each.

    `ended` says what it means that no more comes, `close` ends what was started for it.
    """

    def __init__(
        self, source: Iterable[str], sink: Sink, host: str, ended: Callable[[], Finding], close: Callable[[], None]
    ) -> None:
        self.host = host
        self.close = close
        self._sink, self._ended = sink, ended
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, args=(source,), daemon=True).start()

    def ask(self, order: str, limit: float, /, **words: Any) -> dict[str, Any]:
        """The answer to an order. Raises Lost where none comes within `limit` seconds, or ever."""
        doing, end = order, time.monotonic() + limit
        try:
            self.tell(order, **words)
            while True:
                said = self._answers.get(timeout=max(end - time.monotonic(), 0))
                if said is None:
                    raise Lost(self._ended())
                if "answer" in said:
                    return dict(said["answer"])
                doing = said["doing"]
        except queue.Empty:
            what = f"no answer in {limit:.0f} s, at: {doing}"
            do = f"look on {self.host} at what hangs there: a network disk, a driver (`dmesg`), a process that is stuck"
            raise Lost(Finding("reach", BAD, what, do, (self.host,))) from None
        except OSError:
            raise Lost(self._ended()) from None

    def tell(self, order: str, **words: Any) -> None:
        """Give an order whose answer is not waited for."""
        self._sink.write(f"{MARK}{json.dumps({'order': order, **words})}\n")
        self._sink.flush()

    def _read(self, source: Iterable[str]) -> None:
        try:
            for line in source:
                if line.startswith(MARK):
                    self._answers.put(dict(parse_json(line[len(MARK) :])))
        except (OSError, ValueError, TypeError):  # the connection was reset, or closed by us; or no JSON object came
            pass
        self._answers.put(None)


def local() -> Link:
    """This host, by a process of its own."""
    return _process([sys.executable, "-m", "megagpt", "host-agent"], socket.gethostname(), _ended_here)


def over_ssh(host: str, env: Mapping[str, str]) -> Link:
    """Another host, with the Python, folder and variables that DeepSpeed's launcher would give its ranks there."""
    folder, python = os.getcwd(), sys.executable
    exported = " ".join(f"{name}={shlex.quote(value)}" for name, value in exports(env).items())
    there = (
        f"cd {shlex.quote(folder)} 2>/dev/null || exit {_NO_FOLDER}; "
        f"[ -x {shlex.quote(python)} ] || exit {_NO_PYTHON}; "
        f"exec env {exported} {shlex.quote(python)} -m megagpt host-agent"
    )
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT}", *ssh_words(env)]
    return _process(["ssh", *options, host, there], host, _ended_there)


class Lines:
    """Lines of text over an authenticated channel, each a message, with the few methods of a text stream."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def __iter__(self) -> Iterator[str]:
        """Yield lines until the other end has gone."""
        while True:
            try:
                yield self._channel.receive().decode("utf-8", "replace")
            except (EOFError, OSError):
                return

    def write(self, line: str) -> None:
        """Send a line. Raises OSError if the other end has gone."""
        self._channel.send(line.encode("utf-8", "surrogateescape"))

    def flush(self) -> None:
        """Nothing: each line is sent at once."""


def over_channel(channel: Channel, host: str) -> Link:
    """A rank that has come by itself, and has proved that it is of this job."""
    stream = Lines(channel)

    def ended() -> Finding:
        return Finding("reach", BAD, "the rank has ended", "see what its log says", (host,))

    return Link(stream, stream, host, ended, channel.close)


def exports(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that DeepSpeed's launcher hands on: by their names, and those of its file of variables."""
    found = {name: value for name, value in env.items() if name.startswith(_EXPORTED)}
    found["PYTHONPATH"] = ":".join(filter(None, (os.getcwd(), env.get("PYTHONPATH", ""))))
    for folder in (Path.home(), Path(".")):
        file = folder / env.get("DS_ENV_FILE", ".deepspeed_env")
        if file.is_file():
            lines = file.read_text().splitlines()
            found |= dict(line.split("=", 1) for line in lines if "=" in line)
    return found


def ssh_words(env: Mapping[str, str]) -> list[str]:
    """What pdsh is told to add to its calls of ssh."""
    return shlex.split(env.get("PDSH_SSH_ARGS_APPEND", ""))


def _process(words: Sequence[str], host: str, ended: Callable[[str, int, str], Finding]) -> Link:
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    assert process.stdin is not None
    assert process.stdout is not None
    errors: list[str] = []

    def read_errors() -> None:
        assert process.stderr is not None
        errors.extend(line.strip() for line in process.stderr)

    reader = threading.Thread(target=read_errors, daemon=True)
    reader.start()

    def why() -> Finding:
        reader.join(5)
        return ended(host, process.wait(), next((line for line in reversed(errors) if line), ""))

    def close() -> None:
        process.kill()
        process.wait()
        reader.join(5)
        for stream in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):  # an order that was not read
                stream.close()  # type: ignore[union-attr]

    return Link(process.stdout, process.stdin, host, why, close)


def _ended_here(host: str, code: int, error: str) -> Finding:
    do = "run `python -m megagpt host-agent` there by hand, and fix what it reports"
    return Finding("reach", BAD, f"the doctor's part of this host ended with exit code {code}: {error}", do, (host,))


def _ended_there(host: str, code: int, error: str) -> Finding:
    """What the end of an ssh to a host means."""
    if code == _NO_FOLDER:
        do = "mount or copy it to the same path: DeepSpeed starts the ranks there"
        return Finding("code", BAD, f"there is no folder {os.getcwd()}", do, (host,))
    if code == _NO_PYTHON:
        do = "install the same environment at the same path: DeepSpeed starts the ranks with it"
        return Finding("python", BAD, f"there is no Python at {sys.executable}", do, (host,))
    if "No module named" in error:
        do = f"install megagpt there, or copy it to {os.getcwd()}"
        return Finding("code", BAD, f"megagpt cannot be imported: {error}", do, (host,))
    if code != 255:  # ssh's own failures
        return _ended_here(host, code, error)
    remedies = {
        "Permission denied": f"let ssh log in without a question: `ssh-copy-id {host}`",
        "Host key verification failed": f"make the host known: `ssh-keyscan {host} >> ~/.ssh/known_hosts`",
        "Could not resolve": "mend the name in the hostfile, or give it an address in DNS or /etc/hosts",
    }
    otherwise = f"see whether {host} is up, runs sshd, and is let through by firewalls: `ssh {host} true` must work"
    do = next((do for sign, do in remedies.items() if sign in error), otherwise)
    return Finding("reach", BAD, f"ssh does not come through: {error or 'no reason given'}", do, (host,))
