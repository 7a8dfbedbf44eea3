"""Is this the job that was asked for? The real ranks and hosts against what was promised, before anything is built.

A mistyped hostfile starts DeepSpeed on one host, a wrong MPI makes N worlds of one rank: both would train in silence.
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

from megagpt.distributed import nodelist, passing
from megagpt.distributed.place import Rank, in_step
from megagpt.distributed.reach import own_address
from megagpt.errors import Problem, UserError
from megagpt.files import parse_json


def check_world_size(rank: Rank, expected: int | None, ancestors: Sequence[Sequence[str]] = ()) -> None:
    """Refuse to train on other ranks than were promised.

    `ancestors` are the command lines of the processes that started this one: `deepspeed --hostfile` with a file that
    is not there goes on, on this host alone.
    """
    if expected is not None:
        if expected != rank.world_size:
            raise UserError(
                f"{expected} ranks were expected, {rank.world_size} came",
                f"launcher: {rank.launcher}, --expect-world-size {expected}",
                "check the hostfile's path and slots, or the launcher's number of processes",
            )
        return
    for words in ancestors:
        file = hostfile_of(words)
        if file is not None and not Path(file).exists():
            raise UserError(
                f"the hostfile is not there, so that DeepSpeed took this host alone: {rank.world_size} ranks on 1 host",
                f"deepspeed --hostfile {file}",
                "give the path of the hostfile; to train on this host alone, leave --hostfile out",
            )


HAND_ON = "hand it on (`megagpt hosts --write-environment`, `mpirun -x`, `srun --export`), or set it on each host"


@dataclass(frozen=True)
class Host:
    """Where a rank is: the name of its host, and the address by which other hosts reach it."""

    name: str
    address: str


def check_hosts(rank: Rank, facts: Sequence[str], env: Mapping[str, str], expected: int | None) -> list[str]:
    """Compare what all ranks said of themselves (`facts_here`); what is worth a note.

    Raises UserError, the same on every rank, where SLURM or DeepSpeed's launcher promised other hosts, or where what
    must be the same differs.
    """
    told = [parse_json(fact) for fact in facts]
    _check_where(rank, told, env, expected)
    problems = [problem for name in told[0]["same"] if (problem := _difference(name, told))]
    names = sorted({name for fact in told for name in fact["environment"]})
    unlike = {name: line for name in names if (line := _unlike(name, told))}
    if wrong := [line for name, line in unlike.items() if not passing.of_a_host(name)]:
        what = f"{len(wrong)} variables are" if len(wrong) > 1 else "a variable is"
        problems.append(Problem(f"{what} not alike on all ranks", "\n".join(wrong), HAND_ON))
    if problems:
        raise UserError.from_problems(problems)
    return list(unlike.values())


def _check_where(rank: Rank, told: Sequence[dict[str, Any]], env: Mapping[str, str], expected: int | None) -> None:
    """Refuse to run on fewer hosts than the launcher was given, or on others than SLURM gave."""
    hosts = sorted({(fact["host"], fact["boot"]) for fact in told})
    here = f"but the job's {rank.world_size} ranks run on {len(hosts)}: {', '.join(name for name, _ in hosts)}"
    named = max((fact["promised"] for fact in told), key=len)
    if len(named) > len(hosts):
        raise UserError(
            f"deepspeed was given {len(named)} hosts, {', '.join(named)}, {here}",
            "the hostfile",
            "see what each name of the hostfile means (`ssh NAME hostname`); --launcher slurm needs --num_nodes too, "
            "--no_ssh one launcher on each host",
        )
    given = _slurm_hosts(env)
    if expected is None and given and len(given) != len(hosts):
        raise UserError(
            f"SLURM gave {len(given)} hosts, {', '.join(given)}, {here}",
            "the nodes of the step" if in_step(env) else "the nodes of the job",
            "start one task per device with srun, or say --expect-world-size "
            f"{rank.world_size} if these are all that you want",
        )


def hosts_of(facts: Sequence[str]) -> list[Host]:
    """Where each rank is, by what it said of itself."""
    return [Host(told["host"], told["address"]) for told in map(parse_json, facts)]


def facts_here(same: Mapping[str, str], environment: Mapping[str, str], ancestors: Sequence[Sequence[str]] = ()) -> str:
    """What this rank says of itself: its host, the hosts that its launcher was given (`ancestors`: the command lines
    above this process), what must be the same everywhere, and variables that should be alike.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()  # two hosts may have one name
    except OSError:
        boot = ""
    return json.dumps({
        "host": socket.gethostname(), "boot": boot, "address": own_address(),
        "promised": hosts_given(ancestors, environment), "same": dict(same), "environment": dict(environment),
    })  # fmt: skip


def hosts_given(ancestors: Sequence[Sequence[str]], environment: Mapping[str, str]) -> list[str]:
    """The hosts of the whole job, as DeepSpeed's launcher on each host is told, or else as the file of variables that
    `megagpt hosts` wrote says; none under other launchers.
    """
    for word in (word for words in ancestors for word in words):
        if word.startswith("--world_info="):
            return list(parse_json(base64.urlsafe_b64decode(word.partition("=")[2])))
    return [name for name in environment.get(passing.HOSTS, "").split("/") if name]


def ancestors(pid: int | None = None) -> list[list[str]]:
    """The command lines of the processes above this one, the nearest first; none where /proc is not there."""
    lines: list[list[str]] = []
    current = os.getppid() if pid is None else pid
    while current > 1 and len(lines) < 16:
        try:
            words = Path(f"/proc/{current}/cmdline").read_bytes().split(b"\0")
            stat = Path(f"/proc/{current}/stat").read_text()
        except OSError:
            break
        lines.append([word.decode(errors="replace") for word in words])
        current = int(stat.rpartition(")")[2].split()[1])  # the name, in brackets, may hold anything
    return lines


def hostfile_of(words: Sequence[str]) -> str | None:
    """The hostfile that a command line of DeepSpeed's launcher names, before the script that it starts."""
    names = [Path(word).name for word in words]
    if "deepspeed" not in names[:3] and "deepspeed.launcher.runner" not in words:
        return None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in ("--hostfile", "-H"):
            return following
        if word.startswith("--hostfile="):
            return word.partition("=")[2]
        if word.endswith(".py"):
            return None
    return None


def _slurm_hosts(env: Mapping[str, str]) -> list[str]:
    """The hosts that SLURM gave this step or allocation; none where torchrun goes on with fewer."""
    if int(env.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        return []
    names = ("SLURM_STEP_NODELIST",) if in_step(env) else ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
    return next((nodelist.hosts(env[name]) for name in names if name in env), [])


def _difference(name: str, told: Sequence[dict[str, Any]]) -> Problem | None:
    """How what must be the same differs from rank 0's."""
    values = [fact["same"].get(name) for fact in told]
    if (other := _another(values)) is None:
        return None
    return Problem(
        f"rank 0 and rank {other} do not have the same {name}: {values[0]} and {values[other]}",
        f"hosts {told[0]['host']} and {told[other]['host']}",
        "install and copy the same to every host",
    )


def _unlike(name: str, told: Sequence[dict[str, Any]]) -> str | None:
    """A variable that is not alike on all ranks."""
    values = [fact["environment"].get(name, "not set") for fact in told]
    if (other := _another(values)) is None:
        return None
    return f"{name}: {values[0]} on rank 0 ({told[0]['host']}), {values[other]} on rank {other} ({told[other]['host']})"


def _another(values: Sequence[str | None]) -> int | None:
    """The first rank whose value is not rank 0's."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), None)
