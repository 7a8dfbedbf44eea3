"""The doctor's visit: all hosts are asked the same, at the same time, and each has so long for its answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from megagpt.doctor import network
from megagpt.doctor.finding import Finding
from megagpt.doctor.links import Link, Lost
from megagpt.doctor.needs import Needs

BUILD = 10  # times the limit of other things: operators may have to be compiled
_PINGS = 3


@dataclass
class Host:
    """What is known of a host so far; `lost` says why there is no more of it."""

    name: str
    workers: Sequence[tuple[Link | None, list[list[int]]]]
    """who starts which of its ranks (rank, local rank); the first is asked all else, too"""
    lost: Finding | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    clock: tuple[float, float] = (0.0, 0.0)
    """seconds that its clock is ahead of this host's, and how far off that may be"""
    seen: list[int] | None = None
    """the numbers of the hosts whose tokens are seen in the run directory there"""
    probe: dict[str, Any] = field(default_factory=dict)
    reduce: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ranks(self) -> list[int]:
        """All ranks of this host."""
        return [rank for _, ranks in self.workers for rank, _ in ranks]


@dataclass(frozen=True)
class Launch:
    """What DeepSpeed's launcher would find on this host: pdsh, what ssh is told, and which variables it hands on."""

    pdsh: bool
    keep_alive: Mapping[str, int]
    """seconds after which ssh gives a silent host up; 0 is never"""
    kept_back: tuple[str, ...]
    """variables of this host that training depends on, and that would not reach the others, or another value would"""


@dataclass(frozen=True)
class Visit:
    """Hosts in their order, and what they were asked for.

    `alone`: there is no other host than this one. `launch` is there where ssh is to start the ranks.
    """

    hosts: Sequence[Host]
    needs: Needs
    limit: float
    alone: bool = False
    launch: Launch | None = None
    requirements: tuple[str, ...] = ()
    """what megagpt's package says that it needs, as pip writes it"""

    @property
    def world(self) -> int:
        """All ranks."""
        return sum(len(host.ranks) for host in self.hosts)

    @property
    def there(self) -> list[Host]:
        """The hosts that have answered so far."""
        return [host for host in self.hosts if host.lost is None]

    def close(self) -> None:
        """End whatever was started."""
        for link in (link for host in self.hosts for link, _ in host.workers if link):
            link.close()


def examine(visit: Visit, say: Callable[[str], None]) -> None:
    """Ask everything; `say` is told what comes next. A host that is lost is left out of what comes after."""
    name, needs = f"doctor-{secrets.token_hex(4)}", asdict(visit.needs)
    numbers = {id(host): number for number, host in enumerate(visit.hosts)}

    def meet(host: Host, link: Link) -> None:
        link.ask("hello", visit.limit, limit=life(visit.limit))
        host.facts = link.ask("facts", visit.limit, needs=needs, name=name, number=numbers[id(host)])
        host.clock = min((_clock(link, visit.limit) for _ in range(_PINGS)), key=lambda ping: ping[1])

    def look(host: Host, link: Link) -> None:
        host.seen = link.ask("look", visit.limit)["seen"]

    each(visit, meet)
    if visit.needs.run_dir:
        each(visit, look)
    for folders in (False, True):
        each(visit, lambda _, link, folders=folders: link.ask("tidy", visit.limit, folders=folders))  # type: ignore[misc]
    locked = locked_operators(visit)
    operators = ", ".join(visit.needs.operators)
    say(
        "loading torch and DeepSpeed on the hosts" + (f", and {operators}: to build it takes minutes" * bool(operators))
    )
    each(visit, lambda host, link: _probe(visit, host, link, locked))


def life(limit: float) -> float:
    """Seconds after which the doctor's part on a host ends by itself, if nobody ends it."""
    return limit * (5 + 2 * BUILD)


def each(visit: Visit, ask: Callable[[Host, Link], object]) -> None:
    """Ask all hosts that are still there, at the same time."""
    _at_once(visit, [(host, link) for host in visit.there for link, _ in host.workers[:1] if link], ask)


def _at_once(visit: Visit, workers: Sequence[tuple[Host, Link]], ask: Callable[[Host, Link], object]) -> None:
    def one(worker: tuple[Host, Link]) -> None:
        try:
            ask(*worker)
        except Lost as lost:
            worker[0].lost = lost.finding

    with ThreadPoolExecutor(max(len(workers), 1)) as pool:
        try:
            list(pool.map(one, workers))
        except BaseException:  # typed away: nobody is to be waited for
            visit.close()
            raise


def locked_operators(visit: Visit) -> list[str]:
    """The operators that some dead build has locked somewhere: to load one would wait for ever."""
    return [lock["operator"] for lock in dead_locks(visit)]


def dead_locks(visit: Visit) -> list[dict[str, Any]]:
    """The locks, on any host, that no process of any host holds; a folder may be shared between hosts."""
    locks = [{**lock, "host": host.name} for host in visit.there for lock in host.facts["locks"]]
    alive = {lock["path"] for lock in locks if lock["building"]}
    return [lock for lock in locks if lock["path"] not in alive]


def reduce_together(visit: Visit) -> None:
    """The all-reduce over all ranks, by way of the address that DeepSpeed would choose for rank 0."""
    first = visit.hosts[0]
    cuda = all(host.probe.get("accelerator") == "cuda" for host in visit.there)
    words = {
        "address": "127.0.0.1" if visit.alone else network.outside(first.facts["network"]["interfaces"])[1],
        "port": first.facts["port"], "world": visit.world, "backends": ["gloo", "nccl"] if cuda else ["gloo"],
    }  # fmt: skip

    ranks = {id(link): ranks for host in visit.hosts for link, ranks in host.workers if link}

    def ask(host: Host, link: Link) -> None:
        answer = link.ask("reduce", visit.limit * 2, limit=visit.limit, ranks=ranks[id(link)], **words)
        host.reduce += answer["ranks"]

    _at_once(visit, [(host, link) for host in visit.hosts for link, _ in host.workers if link], ask)


def _clock(link: Link, limit: float) -> tuple[float, float]:
    """How far a host's clock is ahead, as seen in the middle of asking, and half of the time that asking took."""
    sent = time.time()
    begun = time.perf_counter()
    theirs = link.ask("clock", limit)["time"]
    half = (time.perf_counter() - begun) / 2
    return theirs - sent - half, half


def _probe(visit: Visit, host: Host, link: Link, locked: Sequence[str]) -> None:
    needs = visit.needs
    on_gpu = needs.gpu_operators if host.facts["nvidia"]["devices"] else ()
    tried = {"operators": needs.operators, "gpu_operators": on_gpu}
    words: dict[str, Any] = {kind: [name for name in names if name not in locked] for kind, names in tried.items()}
    limit = visit.limit * (BUILD if any(words[kind] for kind in tried) else 1)
    host.probe = link.ask("probe", limit + visit.limit, limit=limit, **words)
