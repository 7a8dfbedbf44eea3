"""`megagpt hosts`: check a hostfile, and write the environment variables that the other hosts need."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from megagpt import files
from megagpt.distributed import hostfile, passing


@dataclass(frozen=True)
class HostList:
    """A valid hostfile."""

    hosts: dict[str, int]
    """ranks per host"""
    world_size: int
    environment: str | None
    """absolute path of the file of environment variables, if one was written"""

    def __str__(self) -> str:
        width = max(map(len, self.hosts))
        lines = [f"{host:<{width}}  {slots} ranks" for host, slots in self.hosts.items()]
        lines.append(f"{len(self.hosts)} hosts, {self.world_size} ranks")
        if self.environment:
            file = shlex.quote(self.environment)
            lines.append(f"wrote {self.environment}; before `deepspeed --hostfile`, run:")
            lines.append(f'export DS_ENV_FILE={file} PDSH_SSH_ARGS_APPEND="{passing.SSH_ALIVE}"')
        return "\n".join(lines)


def hosts(file: Path, write: Path | None, env: dict[str, str]) -> HostList:
    """Check a hostfile.

    Args:
        file: the hostfile.
        write: file to which the variables for the other hosts are written, for DS_ENV_FILE; None for no file.
        env: the environment of this process, from which those variables are taken.

    Raises:
        UserError: with every mistake in the hostfile.
    """
    slots = hostfile.read(file)
    if write is not None:
        files.replace_text(write, passing.deepspeed_env({**env, passing.HOSTS: "/".join(slots)}))
    return HostList(slots, sum(slots.values()), str(write.absolute()) if write else None)
