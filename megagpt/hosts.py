"""`megagpt hosts`: is a hostfile right, and what must the other hosts be told?"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from megagpt import files
from megagpt.distributed import hostfile, passing


@dataclass(frozen=True)
class Hosts:
    """The ranks of each host, and their sum; `environment` is the file of variables that was written, if any."""

    hosts: dict[str, int]
    world_size: int
    environment: str | None

    def __str__(self) -> str:
        width = max(map(len, self.hosts))
        lines = [f"{host:<{width}}  {slots} ranks" for host, slots in self.hosts.items()]
        lines.append(f"{len(self.hosts)} hosts, {self.world_size} ranks")
        if self.environment:
            file = shlex.quote(self.environment)
            lines.append(f"wrote {self.environment}; before `deepspeed --hostfile`, type:")
            lines.append(f'export DS_ENV_FILE={file} PDSH_SSH_ARGS_APPEND="{passing.SSH_ALIVE}"')
        return "\n".join(lines)


def hosts(file: Path, write: Path | None, env: dict[str, str]) -> Hosts:
    """Check a hostfile; write the variables of `env` that the other hosts need to `write`, for DS_ENV_FILE."""
    slots = hostfile.read(file)
    if write is not None:
        files.replace_text(write, passing.deepspeed_env({**env, passing.HOSTS: "/".join(slots)}))
    return Hosts(slots, sum(slots.values()), str(write.absolute()) if write else None)
