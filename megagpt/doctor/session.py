"""A session of the doctor, in which all hosts handle the same requests in parallel, each within a time limit."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from megagpt.cluster import Rank
from megagpt.doctor import host_facts
from megagpt.doctor.job_requirements import JobRequirements
from megagpt.doctor.report import ERROR, Finding
from megagpt.doctor.transport import COMPILE_FACTOR, AgentConnection, HostLost, accept_ranks, agent_lifetime

_CLOCK_READINGS = 3


class HostAgent(NamedTuple):
    """Connection to an agent on a host, and the (rank, local rank) of each rank that the agent starts."""

    connection: AgentConnection | None
    ranks: list[list[int]]


@dataclass
class Host:
    """A host, its agents, and the results that it has reported so far."""

    name: str
    agents: Sequence[HostAgent]
    """agents on this host; the first one handles all requests, and the others only start ranks"""
    lost: Finding | None = None
    """reason why the host no longer answers; None if it does"""
    facts: dict[str, Any] = field(default_factory=dict)
    clock: tuple[float, float] = (0.0, 0.0)
    """number of seconds by which the host's clock is ahead of the local clock, and its uncertainty"""
    visible_markers: list[int] | None = None
    """numbers of the hosts whose markers in the run directory are visible on this host"""
    probe: dict[str, Any] = field(default_factory=dict)
    all_reduce: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ranks(self) -> list[int]:
        """Numbers of the ranks on this host."""
        return [rank for agent in self.agents for rank, _ in agent.ranks]


@dataclass(frozen=True)
class LauncherFacts:
    """Programs, ssh settings and environment variables that DeepSpeed's launcher would use on this host."""

    pdsh: bool
    keep_alive: Mapping[str, int]
    """number of seconds after which ssh disconnects from each host if it becomes silent; 0 means never"""
    not_forwarded: tuple[str, ...]
    """variables that affect training but would be missing on the other hosts, or have another value there"""


@dataclass(frozen=True)
class Session:
    """The hosts to check, and the requirements that they are checked for."""

    hosts: Sequence[Host]
    requirements: JobRequirements
    limit: float
    """time limit per step in seconds"""
    single_host: bool = False
    launcher: LauncherFacts | None = None
    """facts about DeepSpeed's launcher; None unless it would start the ranks over ssh"""
    package_requirements: tuple[str, ...] = ()
    """requirements of the megagpt package, as pip writes them"""

    @property
    def world_size(self) -> int:
        """Total number of ranks."""
        return sum(len(host.ranks) for host in self.hosts)

    @property
    def reachable(self) -> list[Host]:
        """The hosts that have answered all requests so far."""
        return [host for host in self.hosts if host.lost is None]

    @property
    def first(self) -> Host:
        """The first reachable host, with which the other hosts are compared."""
        return self.reachable[0]

    def differing(self, *keys: str) -> Iterator[tuple[Host, Any, Any]]:
        """Yield (host, its fact, the first host's fact) for each reachable host whose fact differs from the first's."""
        expected = _nested(self.first.facts, keys)
        for host in self.reachable[1:]:
            if (fact := _nested(host.facts, keys)) != expected:
                yield host, fact, expected

    def dead_locks(self) -> list[tuple[Host, dict[str, Any]]]:
        """Return the build locks that no process on any host holds, each with its host.

        All hosts are considered, because they may share the folder of the locks.
        """
        locks = [(host, lock) for host in self.reachable for lock in host.facts["locks"]]
        building = {lock["path"] for _, lock in locks if lock["building"]}
        return [(host, lock) for host, lock in locks if lock["path"] not in building]

    def close(self) -> None:
        """Close all connections, which ends the agents on the hosts."""
        for connection in (agent.connection for host in self.hosts for agent in host.agents):
            if connection:
                connection.close()


def _nested(facts: Mapping[str, Any], keys: Sequence[str]) -> Any:
    for key in keys[:-1]:
        facts = facts[key]
    return facts.get(keys[-1], "not set")


def collect_from_hosts(session: Session, progress: Callable[[str], None]) -> None:
    """Collect facts and probe results from all hosts. A host that no longer answers is omitted from later steps.

    Args:
        session: The session. The results are stored in its hosts.
        progress: Function that is called with a description of the next step.
    """
    limit, requirements, name = session.limit, session.requirements, f"doctor-{secrets.token_hex(4)}"

    def collect_facts(host: Host, connection: AgentConnection) -> None:
        connection.request("hello", limit, limit=agent_lifetime(limit))
        number = next(number for number, one in enumerate(session.hosts) if one is host)
        host.facts = connection.request("facts", limit, requirements=asdict(requirements), session=name, number=number)
        host.clock = min((_clock_offset(connection, limit) for _ in range(_CLOCK_READINGS)), key=lambda one: one[1])

    def look_for_markers(host: Host, connection: AgentConnection) -> None:
        host.visible_markers = connection.request("visible_markers", limit)["hosts"]

    on_all_hosts(session, collect_facts)
    if requirements.run_dir:
        on_all_hosts(session, look_for_markers)
        on_all_hosts(session, lambda _, connection: connection.request("remove_marker", limit))
        on_all_hosts(session, lambda _, connection: connection.request("remove_folders", limit))
    building = f", and {', '.join(requirements.operators)}: compiling takes minutes" if requirements.operators else ""
    progress(f"loading torch and DeepSpeed on the hosts{building}")
    # Loading an operator with a dead lock would wait forever.
    locked = {lock["operator"] for _, lock in session.dead_locks()}
    on_all_hosts(session, lambda host, connection: _probe(session, host, connection, locked))


def on_all_hosts(session: Session, step: Callable[[Host, AgentConnection], object]) -> None:
    """Run a step with the first agent of each reachable host in parallel. Hosts that do not answer are marked as lost.

    Args:
        session: The session.
        step: Function of a host and the connection to its first agent.
    """
    _in_parallel(session, [(host, host.agents[0]) for host in session.reachable],
                 lambda host, agent: step(host, agent.connection))  # type: ignore[arg-type]  # fmt: skip


def _in_parallel(
    session: Session, agents: Sequence[tuple[Host, HostAgent]], step: Callable[[Host, HostAgent], object]
) -> None:
    def run(host: Host, agent: HostAgent) -> None:
        try:
            step(host, agent)
        except HostLost as lost:
            host.lost = lost.finding

    connected = [(host, agent) for host, agent in agents if agent.connection]
    with ThreadPoolExecutor(max(len(connected), 1)) as pool:
        try:
            list(pool.map(lambda one: run(*one), connected))
        except BaseException:  # After Ctrl-C, closing the connections ends the steps that still wait.
            session.close()
            raise


def all_reduce_over_ranks(session: Session) -> None:
    """Run an all-reduce over all ranks, which connect to the address that DeepSpeed would choose for rank 0."""
    first = session.hosts[0]
    external_address = host_facts.external_interface(first.facts["network"]["interfaces"])[1]
    has_cuda = all(host.probe.get("accelerator") == "cuda" for host in session.reachable)
    arguments = {
        "address": "127.0.0.1" if session.single_host else external_address, "port": first.facts["port"],
        "world_size": session.world_size, "backends": ["gloo", "nccl"] if has_cuda else ["gloo"],
    }  # fmt: skip

    def reduce(host: Host, agent: HostAgent) -> None:
        assert agent.connection
        result = agent.connection.request(
            "all_reduce", session.limit * 2, limit=session.limit, ranks=agent.ranks, **arguments
        )
        host.all_reduce += result["ranks"]

    _in_parallel(session, [(host, agent) for host in session.hosts for agent in host.agents], reduce)


def _clock_offset(connection: AgentConnection, limit: float) -> tuple[float, float]:
    """Return the number of seconds by which a host's clock is ahead, and the uncertainty of this number.

    The host is assumed to read its clock halfway through the request, so the uncertainty is half the round-trip time.
    """
    sent, started = time.time(), time.perf_counter()
    theirs = connection.request("clock", limit)["time"]
    half = (time.perf_counter() - started) / 2
    return theirs - sent - half, half


def _probe(session: Session, host: Host, connection: AgentConnection, locked: set[str]) -> None:
    requirements = session.requirements
    gpu_operators = requirements.gpu_operators if host.facts["nvidia"]["devices"] else ()
    operators = {
        "operators": [name for name in requirements.operators if name not in locked],
        "gpu_operators": [name for name in gpu_operators if name not in locked],
    }
    limit = session.limit * (COMPILE_FACTOR if any(operators.values()) else 1)
    host.probe = connection.request("probe_torch", limit + session.limit, limit=limit, **operators)


def hosts_of_ranks(rank: Rank, limit: float, env: Mapping[str, str]) -> list[Host]:
    """Wait on rank 0 for all other ranks, and group them by host.

    Args:
        rank: This rank.
        limit: Time to wait, in seconds. A rank that has not connected by then is returned as a separate, lost host.
        env: Environment of this process.

    Returns:
        The hosts of all ranks.
    """
    ranks = accept_ranks(rank, limit, env)
    agents: dict[str, list[HostAgent]] = {}
    for number, (host, local_rank, connection) in sorted(ranks.items()):
        agents.setdefault(host, []).append(HostAgent(connection, [[number, local_rank]]))
    hosts = [Host(name, of_host) for name, of_host in agents.items()]
    for number in range(rank.world_size):
        if number not in ranks:
            do = "see the launcher's output or that rank's log: it has not been started, or cannot reach rank 0"
            name, what = f"rank {number}", f"has not connected within {limit:.0f} s"
            hosts.append(Host(name, [HostAgent(None, [[number, 0]])], Finding("connection", ERROR, what, do, (name,))))
    return hosts
