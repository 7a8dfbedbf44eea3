"""The doctor's agent on each host. It receives requests and sends results, each as one line of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megagpt.doctor import host_facts
from megagpt.files import parse_json

PREFIX = "megagpt-doctor "
"""Start of each line of the protocol. Other lines, such as the output of a login shell, are ignored."""

REQUESTS = ("hello", "facts", "clock", "visible_markers", "remove_marker", "remove_folders", "probe_torch",
            "all_reduce")  # fmt: skip
"""Methods of Agent that may be requested."""


class Agent:
    """Handles requests, each of which consists of the name of a method and its arguments.

    Args:
        progress: Function that is called with a description of the agent's next step.
        identity: Values that `hello` returns in addition to the host: rank and local rank if this process is a rank.
    """

    def __init__(self, progress: Callable[[str], None], identity: dict[str, Any]) -> None:
        self._progress, self._identity = progress, identity
        self._marker: host_facts.RunDirectoryMarker | None = None

    def hello(self, limit: float) -> dict[str, Any]:
        """Return the host's name and this agent's identity, and make the agent exit by itself after `limit` seconds."""
        signal.signal(signal.SIGALRM, lambda *_: sys.exit(1))
        signal.alarm(round(limit))
        return {"host": socket.gethostname(), **self._identity}

    def facts(self, requirements: dict[str, Any], session: str, number: int) -> dict[str, Any]:
        """Return all facts about this host. If the job has a run directory, write a marker into it."""
        found = host_facts.collect(requirements, self._progress)
        if run_dir := requirements["run_dir"]:
            self._progress(f"run directory, writing into {run_dir}")
            self._marker = host_facts.RunDirectoryMarker(Path(run_dir), session, number)
            found["run"] = self._marker.write()
        return found

    def clock(self) -> dict[str, Any]:
        """Return the current time on this host, in seconds since the epoch."""
        return {"time": time.time()}

    def visible_markers(self) -> dict[str, Any]:
        """Return the numbers of the hosts whose markers this host sees in the run directory."""
        return {"hosts": self._marker.visible() if self._marker else []}

    def remove_marker(self) -> dict[str, Any]:
        """Remove this host's marker."""
        if self._marker:
            self._marker.remove()
        return {}

    def remove_folders(self) -> dict[str, Any]:
        """Remove the folders that were created for the marker."""
        if self._marker:
            self._marker.remove_folders()
        return {}

    def probe_torch(self, limit: float, **arguments: Any) -> dict[str, Any]:
        """Run `probes.probe_torch` in a separate process, and return its result."""
        return ProbeProcess("torch", {**arguments, "limit": limit}).result(limit)

    def all_reduce(self, limit: float, ranks: list[list[int]], **arguments: Any) -> dict[str, Any]:
        """Take part in an all-reduce over the ranks of all hosts, and return the results of the ranks on this host.

        Args:
            limit: Time limit in seconds.
            ranks: Pairs of (rank, local rank), one for each rank to start on this host.
            arguments: Arguments of `probes.all_reduce` that are the same for all ranks.
        """
        arguments["limit"] = limit
        probes = [ProbeProcess("all-reduce", {**arguments, "rank": rank, "local_rank": local}) for rank, local in ranks]
        end = time.monotonic() + limit
        return {"ranks": [probe.result(end - time.monotonic()) for probe in probes]}


class ProbeProcess:
    """A process that runs one of the probes in probes.py."""

    def __init__(self, probe: str, arguments: dict[str, Any]) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-m", "megagpt.doctor.probes", probe, json.dumps(arguments)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._errors, start_new_session=True
        )

    def result(self, limit: float) -> dict[str, Any]:
        """Wait for the probe, kill it and its children, and return all parts of its result.

        If the probe has failed, the result contains `died`, the last line of its standard error. If it has not ended
        within `limit` seconds, the result contains `hung`, which is the limit. In both cases `at` is the step at which
        this happened.
        """
        failure: dict[str, Any] = {}
        try:
            if code := self._process.wait(max(limit, 0)):
                failure = {"died": f"exit code {code}"}
        except subprocess.TimeoutExpired:
            failure = {"hung": limit}
        finally:
            self._kill()
        with self._output, self._errors:
            self._output.seek(0)
            self._errors.seek(0)
            found = {"at": "the start"}
            for line in self._output:
                if line.startswith("{") and line.endswith("\n"):
                    found.update(parse_json(line))
            errors = [line.strip() for line in self._errors if line.strip()]
        if "died" in failure and errors:
            failure["died"] = errors[-1]
        if not failure:
            del found["at"]
        return found | failure

    def _kill(self) -> None:
        """Kill all processes of the probe's session, and remove its build locks.

        If a build lock remained, the next build would wait for it forever.
        """
        locks = [Path(lock["path"]) for lock in host_facts.build_locks()]
        held = [lock for lock in locks if self._process.pid in host_facts.lock_holders(lock)]
        for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # Sessions are compared, because ninja starts each compiler in a process group of its own.
                if os.getsid(pid) == self._process.pid:
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()
        for lock in held:
            lock.unlink(missing_ok=True)


def serve(requests: Iterable[str], send: Callable[[str], object], **identity: Any) -> None:
    """Handle requests until there are no more, or until the connection is closed.

    Args:
        requests: Lines that are received. Those that do not begin with PREFIX are ignored.
        send: Function that sends a line.
        identity: Values that `hello` returns about this process.
    """

    def send_message(message: dict[str, Any]) -> None:
        send(f"{PREFIX}{json.dumps(message)}\n")

    agent = Agent(lambda step: send_message({"doing": step}), identity)
    try:
        for line in requests:
            if line.startswith(PREFIX):
                arguments = dict(parse_json(line[len(PREFIX) :]))
                name = arguments.pop("request")
                if name not in REQUESTS:
                    raise ValueError(f"unknown request: {name!r:.40}")
                send_message({"result": getattr(agent, name)(**arguments)})
    except (BrokenPipeError, ConnectionError):
        pass  # The process that sent the requests has ended.
    finally:
        agent.remove_marker()
        agent.remove_folders()


def main() -> None:
    """Handle requests from standard input, and send results to standard output.

    Anything else that this process prints goes to standard error.
    """
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    serve(sys.stdin, output.write)
