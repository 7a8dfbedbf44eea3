"""What all checks share: findings by their kind, and the comparison of every host with the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from megagpt.doctor.examination import Host
from megagpt.doctor.finding import BAD, GOOD, ODD, UNASKED, Finding

V = TypeVar("V")


def good(check: str, what: str) -> Finding:
    """All is well, on every host."""
    return Finding(check, GOOD, what)


def odd(check: str, what: str, do: str, *hosts: Host) -> Finding:
    """Training would start, but somebody should look at this."""
    return Finding(check, ODD, what, do, tuple(host.name for host in hosts))


def bad(check: str, what: str, do: str, *hosts: Host) -> Finding:
    """Training would fail, or not be what it seems."""
    return Finding(check, BAD, what, do, tuple(host.name for host in hosts))


def unasked(check: str, why: str) -> Finding:
    """Nothing was found out, and why."""
    return Finding(check, UNASKED, why)


def unlike(hosts: Sequence[Host], value: Callable[[Host], V]) -> Iterator[tuple[Host, V, V]]:
    """Each host whose value is not that of the first one: the host, its value, and the first one's."""
    for host in hosts[1:]:
        if (here := value(host)) != (there := value(hosts[0])):
            yield host, here, there


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def stopped(answer: Mapping[str, Any]) -> str:
    """How a process of the doctor's ended before its answer was whole; "" where it did not."""
    return f"no end in {answer['hung']:.0f} s" if "hung" in answer else str(answer.get("died", ""))


def number(count: int, name: str) -> str:
    """So many things, for people."""
    return f"{count:,} {name}{'s' * (count != 1)}"


NO_RECIPE = "not asked: no --recipe"
NO_CONFIG = "not asked: no --recipe and --deepspeed_config"
