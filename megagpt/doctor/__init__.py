"""`megagpt doctor`: what is wrong with this machine or cluster, before training starts there.

Facts are gathered on each host (facts.py; probe.py and reduce.py in processes of their own) and judged on one.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.cluster import Rank, env_forwarding, from_environment, hostfile
from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.doctor.examination import Host, Launch, Visit
    from megagpt.doctor.finding import Finding, Report


@dataclass(frozen=True)
class Options:
    """What the command line says; see `megagpt doctor --help`."""

    hostfile: Path | None = None
    as_rank: bool = False
    recipe: Path | None = None
    deepspeed_config: Path | None = None
    overrides: tuple[str, ...] = ()
    limit: float = 60.0


def doctor(options: Options, env: Mapping[str, str]) -> Report | None:
    """Examine this host, those of a hostfile, or those of all ranks; None on ranks other than 0.

    No host that hangs is waited for longer than the limit at each step. Raises UserError for mistakes of the
    hostfile, the recipe or the config.
    """
    from megagpt.doctor import needs as asked
    from megagpt.doctor import ranks

    rank = from_environment(env) if options.as_rank else Rank()
    if rank.rank > 0:
        ranks.serve(rank, options.limit, env)
        return None
    slots = hostfile.read(options.hostfile) if options.hostfile else {socket.gethostname(): _devices(env)}
    world = rank.world_size if options.as_rank else sum(slots.values())
    needs = asked.of(options.recipe, options.deepspeed_config, options.overrides, world)
    from megagpt.doctor.examination import Visit
    from megagpt.doctor.facts import requirements

    hosts = ranks.receive(rank, options.limit, env) if rank.world_size > 1 else _hosts(slots, env)
    launch = _launch(list(slots), env) if len(slots) > 1 else None
    alone = _alone([host.name for host in hosts])
    return examine(Visit(hosts, needs, options.limit, alone, launch, tuple(requirements())))


def examine(visit: Visit) -> Report:
    """Ask all hosts everything, and judge what they say; whatever was started is ended."""
    from rich.console import Console

    from megagpt.doctor import examination, wires
    from megagpt.doctor.finding import Report

    with Console(stderr=True).status("asking the hosts") as status:  # on a terminal only
        try:
            examination.examine(visit, status.update)
            if wires.can_reduce(visit):
                status.update("an all-reduce over all ranks")
                examination.reduce_together(visit)
        finally:
            visit.close()
    return Report.of(list(judge(visit)))


def judge(visit: Visit) -> Iterator[Finding]:
    """All findings, in the order in which things are to be mended."""
    for check in checks():
        yield from check(visit)


def checks() -> tuple[Callable[[Visit], Iterator[Finding]], ...]:
    """All that is checked, in order."""
    from megagpt.doctor import machine, software, storage, wires

    return (
        wires.reach, wires.launcher, software.python, software.packages, software.imports, software.code,
        software.recipe, software.environment, storage.data, storage.run_directory, storage.disks, machine.clock,
        machine.devices, software.operators, wires.interface, wires.all_reduce, machine.open_files,
        machine.locked_memory, machine.pinned_memory, machine.device_memory, machine.host_memory,
    )  # fmt: skip


def _hosts(slots: Mapping[str, int], env: Mapping[str, str]) -> list[Host]:
    """The hosts of a hostfile, each reached as DeepSpeed's launcher would."""
    from megagpt.doctor import links
    from megagpt.doctor.examination import Host

    first, hosts = 0, []
    if shutil.which("ssh") is None and not _alone(slots):
        raise UserError("there is no ssh on this host", "", "install OpenSSH's client (Debian: openssh-client)")
    for host, count in slots.items():
        link = links.local() if _alone(slots) else links.over_ssh(host, env)
        hosts.append(Host(host, [(link, [[first + local, local] for local in range(count)])]))
        first += count
    return hosts


def _alone(names: Collection[str]) -> bool:
    """Whether this host is the only one."""
    return set(names) <= {"localhost", socket.gethostname()} and len(names) == 1


def _devices(env: Mapping[str, str]) -> int:
    """How many ranks DeepSpeed would start on this host: one for each device, or one on a CPU."""
    if env.get("DS_ACCELERATOR", "cuda") != "cuda":
        return 1
    if visible := env.get("CUDA_VISIBLE_DEVICES"):
        return len(visible.split(","))
    from megagpt.doctor import facts

    return int(facts.nvidia()["devices"]) or 1


def _launch(hosts: list[str], env: Mapping[str, str]) -> Launch:
    """What DeepSpeed's launcher would find here."""
    from megagpt.doctor import links
    from megagpt.doctor.examination import Launch

    alive = {}
    for host in hosts:
        words = ["ssh", *links.ssh_words(env), "-G", host]
        said = subprocess.run(words, capture_output=True, text=True, check=False).stdout
        settings = dict(line.split(" ", 1) for line in said.splitlines() if " " in line)
        alive[host] = int(settings.get("serveraliveinterval", 0)) * int(settings.get("serveralivecountmax", 0))
    exported = links.exports(env)
    kept = tuple(name for name, value in env_forwarding.passed_on(env).items() if exported.get(name) != value)
    return Launch(shutil.which("pdsh") is not None, alive, kept)
