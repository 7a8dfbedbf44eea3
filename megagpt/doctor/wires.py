"""Checks of ssh and of the network between hosts: pure functions of what the hosts have said."""

from __future__ import annotations

from collections.abc import Iterator

from megagpt.cluster import env_forwarding
from megagpt.doctor import network
from megagpt.doctor.examination import Host, Visit
from megagpt.doctor.finding import Finding
from megagpt.doctor.judging import bad, good, number, odd, stopped, unasked

_PATIENCE = 120  # seconds that a silent host is waited for, without a word


def reach(visit: Visit) -> Iterator[Finding]:
    """Every host answers. What else became of one that is lost belongs to another check."""
    lost = [host.lost for host in visit.hosts if host.lost]
    yield from lost
    there = visit.there
    if visit.alone and not lost:
        yield unasked("reach", "this host alone: no --hostfile")
    elif not lost:
        yield good(
            "reach",
            f"{len(there)} hosts with {number(visit.world, 'rank')} answer" + (" over ssh" * bool(visit.launch)),
        )


def launcher(visit: Visit) -> Iterator[Finding]:
    """What DeepSpeed's launcher starts the ranks with is here, and notices a host that has fallen silent."""
    if visit.launch is None:
        return
    if not visit.launch.pdsh:
        do = "install pdsh (Debian: pdsh), or start with `deepspeed --launcher openmpi`"
        yield bad("launcher", "there is no pdsh on this host", do)
    do = f'export PDSH_SSH_ARGS_APPEND="{env_forwarding.SSH_ALIVE}"'
    waits: dict[int, list[Host]] = {}
    for host in visit.hosts:
        waits.setdefault(visit.launch.keep_alive.get(host.name, 0), []).append(host)
    for seconds, hosts in waits.items():
        if not 0 < seconds <= _PATIENCE:
            how_long = f"{seconds:,} s" if seconds else "for ever (no ServerAliveInterval)"
            yield odd("launcher", f"if the host falls silent, `deepspeed`'s ssh waits {how_long}", do, *hosts)
    if visit.launch.pdsh and max(waits) <= _PATIENCE and min(waits) > 0:
        yield good("launcher", f"pdsh; ssh gives up a silent host after {max(waits)} s")


def interface(visit: Visit) -> Iterator[Finding]:
    """Ranks offer each other an address that other hosts can reach: gloo begins with the host's own name."""
    if visit.alone:
        return
    wrong = False
    for host in visit.there:
        for finding in _interface(host):
            wrong = True
            yield finding
    if visit.there and not wrong:
        names = {_carrier(host) for host in visit.there}
        yield good("interface", f"{' and '.join(sorted(names))} will carry the traffic")


def _interface(host: Host) -> Iterator[Finding]:
    found, resolved = host.facts["network"]["interfaces"], host.facts["network"]["resolved"]
    name, address = network.outside(found)
    there = ", ".join(f"{one} {has}" for one, has in found.items())
    named = host.facts["environment"].get("GLOO_SOCKET_IFNAME", "")
    if not name:
        do = "see `ip address` there: no interface but the loopback has an IPv4 address"
        yield bad("interface", f"the host has no address that others could reach: {there}", do, host)
    elif named:
        first = named.split(",")[0]
        if first not in found or found[first].startswith("127."):
            do = f"export GLOO_SOCKET_IFNAME={name}"
            yield bad("interface", f"GLOO_SOCKET_IFNAME is {named}, which leads to no other host: {there}", do, host)
    else:
        do = f"write `{address} {host.facts['host']}` into /etc/hosts there in its place, or export " \
             f"GLOO_SOCKET_IFNAME={name} and NCCL_SOCKET_IFNAME={name}"  # fmt: skip
        if not resolved:
            yield bad("interface", "the host's own name has no address, so ranks would offer the loopback", do, host)
        elif not set(resolved) & {has for has in found.values() if not has.startswith("127.")}:
            what = f"the host's own name is {', '.join(resolved)} to itself, where no other host reaches it: {there}"
            yield bad("interface", what, do, host)


def _carrier(host: Host) -> str:
    """The interface that gloo will take."""
    found, resolved = host.facts["network"]["interfaces"], host.facts["network"]["resolved"]
    named = str(host.facts["environment"].get("GLOO_SOCKET_IFNAME", "")).split(",")[0]
    return named or next((name for name, address in found.items() if address in resolved), "")


def can_reduce(visit: Visit) -> bool:
    """Whether an all-reduce has a chance: it would only wait where anything else stands in its way."""
    loaded = all("torch" in host.probe for host in visit.there)
    return visit.world > 1 and len(visit.there) == len(visit.hosts) and loaded and not any(
        _interface(host) for host in visit.there if not visit.alone for _ in _interface(host)
    )  # fmt: skip


def all_reduce(visit: Visit) -> Iterator[Finding]:
    """All ranks find each other and sum a tensor, over each backend that training uses."""
    if visit.world < 2:
        yield unasked("all-reduce", "not asked: one rank alone")
        return
    said = [(host, rank) for host in visit.hosts for rank in host.reduce]
    if not said:
        yield unasked("all-reduce", "not made: it would wait for what is wrong above")
        return
    failed = [(host, rank) for host, rank in said if stopped(rank)]
    for host, rank in failed:
        do = "let the hosts reach each other on all ports (firewalls), and name the interface that does: " \
             "GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"  # fmt: skip
        yield bad("all-reduce", f"{rank['at']}: {stopped(rank)}", do, host)
    if not failed:
        speeds = said[0][1]["speeds"]
        named = ", ".join(f"{backend} {speed / 1e9:.2f} GB/s" for backend, speed in speeds.items())
        yield good("all-reduce", f"{visit.world} ranks: {named}")
