"""Checks of ssh and of the network between hosts, based on the facts that the hosts have reported."""

from __future__ import annotations

from megagpt.cluster import env_forwarding
from megagpt.doctor import host_facts
from megagpt.doctor.report import CheckResult
from megagpt.doctor.session import Host, Session
from megagpt.doctor.software_checks import failure_of
from megagpt.errors import plural

# Maximum time, in seconds, after which ssh should disconnect from a host that has become silent.
_MAX_SSH_TIMEOUT = 120


def check_connection(session: Session, result: CheckResult) -> None:
    """Check that every host answers.

    If the reason why a host does not answer belongs to another check, the finding has the name of that check.
    """
    result.findings += [host.lost for host in session.hosts if host.lost]
    if session.single_host and not result.findings:
        result.skip("no other hosts: no --hostfile")
        return
    how = " over ssh" if session.launcher else ""
    result.passed(f"{plural(len(session.hosts), 'host')} with {plural(session.world_size, 'rank')} answer{how}")


def check_launcher(session: Session, result: CheckResult) -> None:
    """Check that pdsh, with which DeepSpeed starts ranks, is installed, and that ssh detects silent hosts."""
    launcher = session.launcher
    if launcher is None:
        return
    if not launcher.pdsh:
        do = "install pdsh (Debian: pdsh), or start with `deepspeed --launcher openmpi`"
        result.error("pdsh is not installed on this host", do)
    timeouts = {host.name: launcher.keep_alive.get(host.name, 0) for host in session.hosts}
    for host, seconds in timeouts.items():
        if not 0 < seconds <= _MAX_SSH_TIMEOUT:
            wait = f"{seconds:,} s" if seconds else "forever (no ServerAliveInterval)"
            do = f'export PDSH_SSH_ARGS_APPEND="{env_forwarding.SSH_ALIVE}"'
            result.warn(f"if the host becomes silent, the ssh of `deepspeed` waits {wait}", do, host)
    result.passed(f"pdsh; ssh gives up a silent host after {max(timeouts.values())} s")


def check_interface(session: Session, result: CheckResult) -> None:
    """Check that gloo will use a reachable address. By default, gloo uses the address of the host's own name."""
    if session.single_host:
        return
    for host in session.reachable:
        if problem := _interface_problem(host):
            result.error(*problem, host.name)
    carriers = {_interface_of_gloo(host) for host in session.reachable}
    result.passed(f"gloo will use {' and '.join(sorted(carriers))}")


def _interface_problem(host: Host) -> tuple[str, str] | None:
    """Return what is wrong with the interface that gloo will use and what to do about it, or None if it is fine."""
    found, resolved = host.facts["network"]["interfaces"], host.facts["network"]["resolved"]
    name, address = host_facts.external_interface(found)
    listed = ", ".join(f"{one} {of_interface}" for one, of_interface in found.items())
    chosen = host.facts["environment"].get("GLOO_SOCKET_IFNAME", "")
    if not name:
        do = "see `ip address` there: no interface except the loopback has an IPv4 address"
        return f"the host has no address that others could reach: {listed}", do
    if chosen:
        of_interface = found.get(chosen.split(",")[0], "127.")
        what = f"GLOO_SOCKET_IFNAME is {chosen}, which does not lead to other hosts: {listed}"
        return (what, f"export GLOO_SOCKET_IFNAME={name}") if of_interface.startswith("127.") else None
    do = f"write `{address} {host.facts['host']}` into /etc/hosts there instead, or export " \
         f"GLOO_SOCKET_IFNAME={name} and NCCL_SOCKET_IFNAME={name}"  # fmt: skip
    if not resolved:
        return "the host's own name does not resolve, so ranks would offer the loopback address", do
    if not set(resolved) & {one for one in found.values() if not one.startswith("127.")}:
        what = f"the host's own name resolves to {', '.join(resolved)}, where other hosts cannot reach it: {listed}"
        return what, do
    return None


def _interface_of_gloo(host: Host) -> str:
    found, resolved = host.facts["network"]["interfaces"], host.facts["network"]["resolved"]
    chosen = str(host.facts["environment"].get("GLOO_SOCKET_IFNAME", "")).split(",")[0]
    return chosen or next((name for name, address in found.items() if address in resolved), "")


def can_all_reduce(session: Session) -> bool:
    """Return whether an all-reduce over several ranks can be tried. If a host has a known problem, it would hang."""
    ready = all(host.lost is None and "torch" in host.probe for host in session.hosts)
    connected = session.single_host or not any(_interface_problem(host) for host in session.reachable)
    return session.world_size > 1 and ready and connected


def check_all_reduce(session: Session, result: CheckResult) -> None:
    """Check that all ranks find each other and can sum a tensor over each backend that training uses."""
    if session.world_size < 2:
        result.skip("only one rank")
        return
    ranks = [(host, rank) for host in session.hosts for rank in host.all_reduce]
    if not ranks:
        result.skip("not run: it would wait because of an error above")
        return
    for host, rank in ranks:
        if failure := failure_of(rank):
            do = "let the hosts reach each other on all ports (firewalls), and set the interface that connects them: " \
                 "GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"  # fmt: skip
            result.error(f"{rank['at']}: {failure}", do, host.name)
    speeds = ranks[0][1].get("speeds", {})
    named = ", ".join(f"{backend} {speed / 1e9:.2f} GB/s" for backend, speed in speeds.items())
    result.passed(f"{plural(session.world_size, 'rank')}: {named}")
