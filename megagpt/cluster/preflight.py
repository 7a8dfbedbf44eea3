"""Preflight checks at launch, which compare the actual ranks and hosts with those that the launcher was given.

If the path of the hostfile is mistyped, DeepSpeed starts ranks on one host only. With the wrong MPI library, every
process is rank 0 of its own job. In both cases training would run without an error.
"""

from __future__ import annotations

import base64
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.cluster import env_forwarding, slurm_nodelist
from megagpt.cluster.launch_env import Rank, is_slurm_step
from megagpt.cluster.reachability import own_address
from megagpt.errors import Problem, UserError, plural
from megagpt.files import parse_json


def check_world_size(rank: Rank, expected: int | None, ancestors: Sequence[Sequence[str]] = ()) -> None:
    """Check that training runs with the intended number of ranks.

    Args:
        rank: This rank.
        expected: The value of --expect-world-size; None if it was not given.
        ancestors: Command lines of this process's ancestors. If one of them is `deepspeed --hostfile` with a file that
            does not exist, DeepSpeed has started ranks on this host only.

    Raises:
        UserError: The number of ranks is not `expected`, or the hostfile does not exist.
    """
    if expected is not None:
        if expected != rank.world_size:
            raise UserError(
                f"expected {expected} ranks, but {rank.world_size} started",
                f"launcher: {rank.launcher}, --expect-world-size {expected}",
                "check the hostfile's path and slots, or the launcher's number of processes",
            )
        return
    for command_line in ancestors:
        file = hostfile_of(command_line)
        if file is not None and not Path(file).exists():
            ranks = plural(rank.world_size, "rank")
            raise UserError(
                f"the hostfile does not exist, so DeepSpeed started {ranks} on this host only",
                f"deepspeed --hostfile {file}",
                "correct the path of the hostfile; to train on this host only, leave out --hostfile",
            )


HOW_TO_FORWARD = (
    "forward it (`megagpt hosts --write-environment`, `mpirun -x`, `srun --export`), or set it on each host"
)


@dataclass(frozen=True)
class RankLocation:
    """Name of a rank's host, and the address by which other hosts reach it."""

    name: str
    address: str


def check_hosts(rank: Rank, descriptions: Sequence[str], env: Mapping[str, str], expected: int | None) -> list[str]:
    """Compare the descriptions of all ranks, and check that they run on all hosts that the launcher was given.

    Args:
        rank: This rank.
        descriptions: The result of `describe_rank` on each rank, in rank order.
        env: Environment of this process.
        expected: The value of --expect-world-size; None if it was not given.

    Returns:
        One line per environment variable that differs between ranks, for the log.

    Raises:
        UserError: The ranks do not run on the hosts that SLURM or DeepSpeed's launcher was given, or they differ in
            something that must be the same. All ranks raise the same error.
    """
    ranks = [parse_json(text) for text in descriptions]
    _check_number_of_hosts(rank, ranks, env, expected)
    problems = [problem for name in ranks[0]["same"] if (problem := _difference(name, ranks))]
    names = sorted({name for one in ranks for name in one["environment"]})
    different = {name: line for name in names if (line := _variable_difference(name, ranks))}
    if wrong := [line for name, line in different.items() if not env_forwarding.may_differ_per_host(name)]:
        what = f"{len(wrong)} environment variables differ" if len(wrong) > 1 else "an environment variable differs"
        problems.append(Problem(f"{what} between ranks", "\n".join(wrong), HOW_TO_FORWARD))
    if problems:
        raise UserError.from_problems(problems)
    return list(different.values())


def _check_number_of_hosts(
    rank: Rank, ranks: Sequence[dict[str, Any]], env: Mapping[str, str], expected: int | None
) -> None:
    """Raise UserError if there are fewer hosts than the launcher was given, or not as many as SLURM allocated."""
    hosts = sorted({(one["host"], one["boot"]) for one in ranks})
    count = "only rank runs" if rank.world_size == 1 else f"{rank.world_size} ranks run"
    here = f"but the job's {count} on {len(hosts)}: {', '.join(name for name, _ in hosts)}"
    named = max((one["launcher_hosts"] for one in ranks), key=len)
    if len(named) > len(hosts):
        raise UserError(
            f"deepspeed was given {len(named)} hosts, {', '.join(named)}, {here}",
            "the hostfile",
            "check which host each name of the hostfile leads to (`ssh NAME hostname`); --launcher slurm also needs "
            "--num_nodes, --no_ssh needs one launcher on each host",
        )
    given = _slurm_hosts(env)
    if expected is None and given and len(given) != len(hosts):
        raise UserError(
            f"SLURM allocated {len(given)} hosts, {', '.join(given)}, {here}",
            "the nodes of the step" if is_slurm_step(env) else "the nodes of the job",
            "start one task per device with srun, or pass --expect-world-size "
            f"{rank.world_size} if these ranks are intended",
        )


def locations_of_ranks(descriptions: Sequence[str]) -> list[RankLocation]:
    """Return the location of each rank from the descriptions of all ranks."""
    return [RankLocation(one["host"], one["address"]) for one in map(parse_json, descriptions)]


def describe_rank(
    same: Mapping[str, str], environment: Mapping[str, str], ancestors: Sequence[Sequence[str]] = ()
) -> str:
    """Return a description of this rank as JSON, to be compared with those of the other ranks.

    Args:
        same: Values that must be the same on every rank, such as versions and checksums.
        environment: Environment variables that should be the same on every rank.
        ancestors: Command lines of this process's ancestors, from which the launcher's hosts are read.
    """
    try:
        # Two hosts may have the same name, but not the same boot id.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return json.dumps({
        "host": socket.gethostname(), "boot": boot, "address": own_address(),
        "launcher_hosts": hosts_of_launcher(ancestors, environment), "same": dict(same),
        "environment": dict(environment),
    })  # fmt: skip


def hosts_of_launcher(ancestors: Sequence[Sequence[str]], environment: Mapping[str, str]) -> list[str]:
    """Return the hosts that the launcher was given for the whole job, or an empty list if they are not known.

    Args:
        ancestors: Command lines of this process's ancestors, which may include DeepSpeed's launcher.
        environment: Environment of this process, which may include HOSTS_VARIABLE.
    """
    return list(_world_info(ancestors)) or [
        name for name in environment.get(env_forwarding.HOSTS_VARIABLE, "").split("/") if name
    ]


def host_per_rank(ancestors: Sequence[Sequence[str]]) -> list[str]:
    """Return the host on which DeepSpeed's launcher starts each rank, or an empty list under other launchers."""
    return [host for host, devices in _world_info(ancestors).items() for _ in devices]


def _world_info(ancestors: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Return the devices per host from the command line of DeepSpeed's launcher on this host."""
    for argument in (argument for command_line in ancestors for argument in command_line):
        if argument.startswith("--world_info="):
            return dict(parse_json(base64.urlsafe_b64decode(argument.partition("=")[2])))
    return {}


def ancestors(pid: int | None = None) -> list[list[str]]:
    """Return the command lines of this process's ancestors, parent first, or an empty list on systems without /proc."""
    lines: list[list[str]] = []
    current = os.getppid() if pid is None else pid
    while current > 1 and len(lines) < 16:
        try:
            arguments = Path(f"/proc/{current}/cmdline").read_bytes().split(b"\0")
            stat = Path(f"/proc/{current}/stat").read_text()
        except OSError:
            break
        lines.append([argument.decode(errors="replace") for argument in arguments])
        # The name of the process, in parentheses, may contain spaces and parentheses itself.
        current = int(stat.rpartition(")")[2].split()[1])
    return lines


def hostfile_of(command_line: Sequence[str]) -> str | None:
    """Return the hostfile on a command line of DeepSpeed's launcher.

    Returns None if the command line has no hostfile or does not belong to that launcher.
    """
    names = [Path(argument).name for argument in command_line]
    if "deepspeed" not in names[:3] and "deepspeed.launcher.runner" not in command_line:
        return None
    for argument, following in zip(command_line, [*command_line[1:], ""], strict=True):
        if argument in ("--hostfile", "-H"):
            return following
        if argument.startswith("--hostfile="):
            return argument.partition("=")[2]
        if argument.endswith(".py"):  # This is the script. Its own arguments follow.
            return None
    return None


def _slurm_hosts(env: Mapping[str, str]) -> list[str]:
    """Return the hosts of this SLURM step or allocation, or an empty list after a restart by torchrun.

    torchrun may restart the ranks on fewer hosts.
    """
    if int(env.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        return []
    names = ("SLURM_STEP_NODELIST",) if is_slurm_step(env) else ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
    return next((slurm_nodelist.expand_hosts(env[name]) for name in names if name in env), [])


def _difference(name: str, ranks: Sequence[dict[str, Any]]) -> Problem | None:
    """Return a problem if a value that must be the same differs between ranks, or None."""
    values = [one["same"].get(name) for one in ranks]
    if (other := _first_different(values)) is None:
        return None
    return Problem(
        f"rank 0 and rank {other} have different {name}: {values[0]} and {values[other]}",
        f"hosts {ranks[0]['host']} and {ranks[other]['host']}",
        "install and copy the same files to every host",
    )


def _variable_difference(name: str, ranks: Sequence[dict[str, Any]]) -> str | None:
    """Return a line about an environment variable if it differs between ranks, or None."""
    values = [one["environment"].get(name, "not set") for one in ranks]
    if (other := _first_different(values)) is None:
        return None
    hosts = ranks[0]["host"], ranks[other]["host"]
    return f"{name}: {values[0]} on rank 0 ({hosts[0]}), {values[other]} on rank {other} ({hosts[1]})"


def _first_different(values: Sequence[str | None]) -> int | None:
    """Return the first rank whose value differs from that of rank 0, or None if all values are equal."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), None)
