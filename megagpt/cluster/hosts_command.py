"""Implementation of `megagpt hosts`, which checks a hostfile and writes the environment that other hosts need."""

from __future__ import annotations

import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megagpt import files
from megagpt.cluster import env_forwarding, hostfile, reachability
from megagpt.errors import Problem, UserError, plural


@dataclass(frozen=True)
class HostList:
    """Hosts and ranks of a valid hostfile."""

    hosts: dict[str, int]
    """number of ranks per host"""
    world_size: int
    environment: str | None
    """absolute path of the file with environment variables; None if it was not written"""

    def __str__(self) -> str:
        width = max(map(len, self.hosts))
        lines = [f"{host:<{width}}  {plural(slots, 'rank')}" for host, slots in self.hosts.items()]
        lines.append(f"{plural(len(self.hosts), 'host')}, {plural(self.world_size, 'rank')}")
        if self.environment:
            file = shlex.quote(self.environment)
            lines.append(f"wrote {self.environment}; before `deepspeed --hostfile`, run:")
            lines.append(f'export DS_ENV_FILE={file} PDSH_SSH_ARGS_APPEND="{env_forwarding.SSH_ALIVE}"')
        return "\n".join(lines)


def hosts(file: Path, write: Path | None, env: dict[str, str]) -> HostList:
    """Check the format of a hostfile, and that the names of its hosts resolve.

    Args:
        file: the hostfile.
        write: file to which the environment variables for the other hosts are written, to be passed to DeepSpeed in
            DS_ENV_FILE; None to write no file.
        env: the environment of this process, from which these variables are taken.

    Returns:
        The hosts, with the number of ranks on each.

    Raises:
        UserError: The hostfile is invalid. The error lists all mistakes at once.
    """
    slots = hostfile.read(file)
    with ThreadPoolExecutor(64) as pool:
        found = dict(zip(slots, pool.map(_resolves, slots), strict=True))
    do = "correct the name, or add it to DNS, /etc/hosts or ~/.ssh/config"
    if problems := [Problem(f"the name {host} does not resolve", str(file), do) for host in slots if not found[host]]:
        raise UserError.from_problems(problems)
    if write is not None:
        files.replace_text(write, env_forwarding.deepspeed_env({**env, env_forwarding.HOSTS_VARIABLE: "/".join(slots)}))
    return HostList(slots, sum(slots.values()), str(write.absolute()) if write else None)


def _resolves(host: str) -> bool:
    """Return True if ssh can find the address of a host. The name may be an alias from ssh's configuration."""
    if reachability.resolves(host):
        return True
    try:
        printed = subprocess.run(["ssh", "-G", host], capture_output=True, text=True, check=False).stdout
    except OSError:  # ssh is not installed on this host.
        return False
    settings = dict(line.split(" ", 1) for line in printed.splitlines() if " " in line)
    return (
        "proxycommand" in settings or "proxyjump" in settings or reachability.resolves(settings.get("hostname", host))
    )
