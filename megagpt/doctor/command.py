"""The command `megagpt doctor`, which finds problems of a machine or cluster before training starts there.

An agent on each host collects facts (host_facts.py) and runs probes (probes.py). This process checks the results.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from megagpt.cluster import Rank, env_forwarding, from_environment, hostfile
from megagpt.doctor import host_facts, machine_checks, network_checks, software_checks, transport
from megagpt.doctor.job_requirements import read_requirements
from megagpt.doctor.report import CheckResult, Report
from megagpt.doctor.session import (
    Host,
    HostAgent,
    LauncherFacts,
    Session,
    all_reduce_over_ranks,
    collect_from_hosts,
    hosts_of_ranks,
)
from megagpt.errors import UserError


@dataclass(frozen=True)
class Options:
    """Options of the command, as described by `megagpt doctor --help`."""

    hostfile: Path | None = None
    as_rank: bool = False
    recipe: Path | None = None
    deepspeed_config: Path | None = None
    overrides: tuple[str, ...] = ()
    limit: float = 60.0


def doctor(options: Options, env: Mapping[str, str]) -> Report | None:
    """Check this host, the hosts of a hostfile, or the hosts of all ranks.

    Args:
        options: Options of the command. A host that does not answer within the time limit is reported as lost.
        env: Environment of this process.

    Returns:
        The report on rank 0, and None on other ranks.

    Raises:
        UserError: The hostfile, the recipe or the config has a mistake.
    """
    rank = from_environment(env) if options.as_rank else Rank()
    if rank.rank > 0:
        transport.serve_as_rank(rank, options.limit, env)
        return None
    slots = hostfile.read(options.hostfile) if options.hostfile else {socket.gethostname(): _ranks_of_this_host(env)}
    world_size = rank.world_size if options.as_rank else sum(slots.values())
    requirements = read_requirements(options.recipe, options.deepspeed_config, options.overrides, world_size)
    hosts = hosts_of_ranks(rank, options.limit, env) if rank.world_size > 1 else _start_agents(slots, env)
    launcher = _launcher_facts(list(slots), env) if len(slots) > 1 else None
    single_host = _is_this_host([host.name for host in hosts])
    return run(
        Session(hosts, requirements, options.limit, single_host, launcher, tuple(host_facts.package_requirements()))
    )


def run(session: Session) -> Report:
    """Collect facts from all hosts, end all processes that were started there, and return the results of all checks."""
    from rich.console import Console

    # The status line is shown only if standard error is a terminal.
    with Console(stderr=True).status("collecting facts from the hosts") as status:
        try:
            collect_from_hosts(session, status.update)
            if network_checks.can_all_reduce(session):
                status.update("running an all-reduce over all ranks")
                all_reduce_over_ranks(session)
        finally:
            session.close()
    return check(session)


def check(session: Session) -> Report:
    """Run all checks on the collected facts. If no host is reachable, only connections and launcher are checked."""
    findings = []
    for name, run_check in checks().items():
        if session.reachable or name in ("connection", "launcher"):
            result = CheckResult(name)
            run_check(session, result)
            findings += result.findings
    return Report.from_findings(findings)


def checks() -> dict[str, Callable[[Session, CheckResult], None]]:
    """Return all checks by name, in the order in which problems should be fixed."""
    return {
        "connection": network_checks.check_connection,
        "launcher": network_checks.check_launcher,
        "python": software_checks.check_python,
        "packages": software_checks.check_packages,
        "imports": software_checks.check_imports,
        "code": software_checks.check_code,
        "recipe": software_checks.check_recipe,
        "variables": software_checks.check_environment,
        "data": machine_checks.check_data,
        "run directory": machine_checks.check_run_directory,
        "disk": machine_checks.check_disk,
        "clock": machine_checks.check_clock,
        "devices": machine_checks.check_devices,
        "operators": software_checks.check_operators,
        "interface": network_checks.check_interface,
        "all-reduce": network_checks.check_all_reduce,
        "open files": machine_checks.check_open_files,
        "locked memory": machine_checks.check_locked_memory,
        "pinned memory": machine_checks.check_pinned_memory,
        "device memory": machine_checks.check_device_memory,
        "host memory": machine_checks.check_host_memory,
    }


def _start_agents(slots: Mapping[str, int], env: Mapping[str, str]) -> list[Host]:
    """Start an agent on each host of a hostfile, over ssh as DeepSpeed's launcher does, or directly on this host."""
    if not _is_this_host(slots) and shutil.which("ssh") is None:
        raise UserError("ssh is not installed on this host", "", "install OpenSSH's client (Debian: openssh-client)")
    first_rank, hosts = 0, []
    for host, count in slots.items():
        connection = (
            transport.start_local_agent() if _is_this_host(slots) else transport.start_agent_over_ssh(host, env)
        )
        ranks = [[first_rank + local_rank, local_rank] for local_rank in range(count)]
        hosts.append(Host(host, [HostAgent(connection, ranks)]))
        first_rank += count
    return hosts


def _is_this_host(names: Collection[str]) -> bool:
    return len(names) == 1 and set(names) <= {"localhost", socket.gethostname()}


def _ranks_of_this_host(env: Mapping[str, str]) -> int:
    """Return the number of ranks that DeepSpeed would start here: one per device, or one without a device."""
    if env.get("DS_ACCELERATOR", "cuda") != "cuda":
        return 1
    if visible := env.get("CUDA_VISIBLE_DEVICES"):
        return len(visible.split(","))
    return int(host_facts.nvidia_driver()["devices"]) or 1


def _launcher_facts(hosts: list[str], env: Mapping[str, str]) -> LauncherFacts:
    keep_alive = {}
    for host in hosts:
        command = ["ssh", *transport.pdsh_ssh_options(env), "-G", host]  # This prints ssh's settings for `host`.
        printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        settings = dict(line.split(" ", 1) for line in printed.splitlines() if " " in line)
        keep_alive[host] = int(settings.get("serveraliveinterval", 0)) * int(settings.get("serveralivecountmax", 0))
    forwarded = transport.variables_forwarded_by_deepspeed(env)
    wanted = env_forwarding.forwarded_variables(env)
    not_forwarded = tuple(name for name, value in wanted.items() if forwarded.get(name) != value)
    return LauncherFacts(shutil.which("pdsh") is not None, keep_alive, not_forwarded)
