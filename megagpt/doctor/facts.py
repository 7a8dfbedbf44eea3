"""What a host says of itself, with Python's standard library alone: it must come even where torch does not load."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import resource
import shutil
import socket
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from megagpt.cluster import env_forwarding, free_port
from megagpt.doctor import network
from megagpt.files import parse_json

_END = 1 << 20  # bytes of a corpus that are read at its beginning, and at its end
_LOCK_MEMORY = 14  # CAP_IPC_LOCK, linux/capability.h: the limit does not hold
_NO_LIMIT = 1 << 60  # a cgroup that has no limit says a number about so large


def gather(needs: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """All facts as plain values. `say` is told what comes next, so that a host that hangs has said at what."""
    parts: dict[str, Callable[[], Any]] = {
        "python": lambda: {"version": platform.python_version(), "executable": sys.executable},
        "packages": packages,
        "code": code,
        "files": lambda: {path: checksum(Path(path)) for path in needs["files"]},
        "data": lambda: {prefix: corpus(prefix, say) for prefix in needs["corpora"]},
        "disks": lambda: {path: disk(Path(path)) for path in [needs["run_dir"], needs["nvme"]] if path},
        "limits": limits,
        "memory": memory,
        "cores": lambda: len(os.sched_getaffinity(0)),
        "nvidia": nvidia,
        "infiniband": lambda: _names(Path("/sys/class/infiniband")),
        "network": network.facts,
        "environment": lambda: env_forwarding.passed_on(os.environ),
        "locks": locks,
        "port": free_port,
    }
    found: dict[str, Any] = {"host": socket.gethostname()}
    for name, part in parts.items():
        say(name)
        found[name] = part()
    return found


def packages() -> dict[str, str]:
    """The version of each package that megagpt needs; "" where it is not installed."""
    needed = [name for line in requirements() if (name := re.split(r"[^\w.-]", line)[0])]
    return {name: _version(name) for name in ["megagpt", *needed]}


def requirements() -> list[str]:
    """What the installed megagpt says that it needs, extras left out; nothing where it is not installed."""
    try:
        return [line for line in requires("megagpt") or [] if "extra ==" not in line]
    except PackageNotFoundError:
        return []


def code() -> dict[str, str]:
    """Where this megagpt lies, and a checksum over its Python files."""
    folder, content = Path(__file__).parent.parent, hashlib.blake2b(digest_size=4)
    for path in sorted(folder.rglob("*.py")):
        content.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return {"folder": str(folder), "checksum": content.hexdigest()}


def checksum(path: Path) -> str:
    """A checksum of a file's bytes; "" where it cannot be read."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=4).hexdigest()
    except OSError:
        return ""


def corpus(prefix: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Sizes in bytes, the checksum of both files' ends, and what the sidecar says; `missing` is what is not there."""
    found: dict[str, Any] = {"missing": [], "sizes": {}, "sidecar": None}
    ends = 0
    for suffix in (".bin", ".idx"):
        path = Path(prefix + suffix)
        say(f"data, reading {path}")
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                for start in (0, max(0, size - _END)):
                    file.seek(start)
                    ends = zlib.crc32(file.read(_END), ends)
        except OSError as error:
            found["missing"].append(f"{path}: {error.strerror}")
            continue
        found["sizes"][suffix] = size
    say(f"data, reading {prefix}.json")
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        sidecar = parse_json(Path(prefix + ".json").read_text())
        found["sidecar"] = [sidecar["bin_crc32"], sidecar["idx_crc32"]]
    return {**found, "ends": ends}


def disk(path: Path) -> dict[str, int]:
    """Bytes free and in all, where `path` is or would be."""
    usage = shutil.disk_usage(next(there for there in (path.absolute(), *path.absolute().parents) if there.exists()))
    return {"free": usage.free, "total": usage.total}


def limits() -> dict[str, Any]:
    """Limits of this process, which its ranks would inherit; None is no limit."""
    files, locked = resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_MEMLOCK)
    status = Path("/proc/self/status").read_text()
    capable = int(re.findall(r"CapEff:\s*(\w+)", status)[0], 16) >> _LOCK_MEMORY & 1
    return {
        "open_files": [_limit(files[0]), _limit(files[1])],
        "locked_memory": None if capable else _limit(locked[0]),
    }


def memory() -> dict[str, int]:
    """Bytes of memory in all and available, no more than this process's group may take."""
    lines = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    total, available = int(lines["MemTotal"]) << 10, int(lines["MemAvailable"]) << 10
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # another version of cgroups; or "max"
            limit = int(Path(file).read_text())
            if limit < _NO_LIMIT:
                total, available = min(total, limit), min(available, limit)
    return {"total": total, "available": available}


def nvidia() -> dict[str, Any]:
    """The number of NVIDIA devices that the driver sees, and its version; 0 and "" without one."""
    words = ""
    with contextlib.suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text()
    found = re.search(r"Kernel Module\D*([\d.]+)", words)
    devices = max(len(_names(Path("/proc/driver/nvidia/gpus"))), len(list(Path("/dev").glob("nvidia[0-9]*"))))
    return {"devices": devices, "driver": found[1] if found else ""}


def locks() -> list[dict[str, Any]]:
    """Locks of builds of DeepSpeed's operators: path, operator, age in seconds, and whether one here is building."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    roots = [Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")]
    found = [path for root in roots for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern)]
    now = time.time()
    return [
        {"path": str(path), "operator": path.parent.name, "seconds": round(now - path.stat().st_mtime),
         "building": bool(holders(path))}
        for path in found
    ]  # fmt: skip


def holders(lock: Path) -> list[int]:
    """The processes on this host that have a lock open: torch's builder does until it is done, a dead one does not."""
    target, found = str(lock.resolve()), []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if os.readlink(link) == target:
                found.append(int(link.parts[2]))
    return found


def _names(folder: Path) -> Sequence[str]:
    return sorted(path.name for path in folder.glob("*"))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value
