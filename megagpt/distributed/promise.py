"""Is this the job that was asked for? The real ranks and hosts against what was promised, before anything is built.

A mistyped hostfile starts DeepSpeed on one host, a wrong MPI makes N worlds of one rank: both would train in silence.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagpt.distributed.place import Rank, in_step
from megagpt.errors import Problem, UserError


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


def check_hosts(rank: Rank, facts: Sequence[str], env: Mapping[str, str], expected: int | None) -> list[str]:
    """Compare what all ranks said of themselves (`facts_here`); what is worth a note.

    Raises UserError, the same on every rank, where SLURM promised more hosts, or where what must be the same differs.
    """
    told = [json.loads(fact) for fact in facts]
    hosts = sorted({fact["host"] for fact in told})
    promised = _slurm_hosts(env)
    if expected is None and promised is not None and promised != len(hosts):
        here = f"{len(hosts)}: {', '.join(hosts)}"
        raise UserError(
            f"SLURM gave {promised} hosts, but the job's {rank.world_size} ranks run on {here}",
            "SLURM_STEP_NUM_NODES" if in_step(env) else "SLURM_JOB_NUM_NODES",
            "start one task per device with srun, or say --expect-world-size "
            f"{rank.world_size} if these are all that you want",
        )
    problems = [problem for name in told[0]["same"] if (problem := _difference(name, told))]
    if problems:
        raise UserError.of(problems)
    names = sorted({name for fact in told for name in fact["environment"]})
    return [note for name in names if (note := _unlike(name, told))]


def facts_here(same: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """What this rank says of itself: its host, what must be the same everywhere, and variables that should be alike."""
    return json.dumps({"host": socket.gethostname(), "same": dict(same), "environment": dict(environment)})


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


def _slurm_hosts(env: Mapping[str, str]) -> int | None:
    """How many hosts SLURM gave this step or allocation; None where torchrun goes on with fewer."""
    if int(env.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        return None
    names = ("SLURM_STEP_NUM_NODES",) if in_step(env) else ("SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    return next((int(env[name]) for name in names if name in env), None)


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
    return f"{name} is {values[0]} on rank 0, {values[other]} on rank {other} ({told[other]['host']})"


def _another(values: Sequence[str | None]) -> int | None:
    """The first rank whose value is not rank 0's."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), None)
