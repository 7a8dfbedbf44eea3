"""Facts about this host, collected with the standard library alone because torch may fail to load."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import re
import resource
import shutil
import socket
import struct
import sys
import zlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from megagpt.cluster import env_forwarding, free_port
from megagpt.files import parse_json

_ENDS_BYTES = 1 << 20  # number of bytes that are read at the start and at the end of a corpus file
# With this capability (linux/capability.h), the limit on locked memory does not apply.
_CAP_IPC_LOCK = 14
# If there is no limit, cgroups v1 reports a number larger than this.
_CGROUP_UNLIMITED = 1 << 60
# Request that returns the address of a network interface (linux/sockios.h).
_SIOCGIFADDR = 0x8915
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
# The marker is larger than the data that a filesystem can store in the inode, so that a full disk is detected.
_MARKER = b"megagpt doctor\n" * 512


def collect(requirements: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Collect all facts about this host.

    Args:
        requirements: Fields of `JobRequirements`, which define the files, corpora and folders to examine.
        progress: Function that is called with the name of each fact before it is collected, so that a hang can be
            located.

    Returns:
        The facts by name, as plain values.
    """
    facts: dict[str, Callable[[], Any]] = {
        "python": lambda: {"version": platform.python_version(), "executable": sys.executable},
        "packages": package_versions,
        "code": code_checksum,
        "files": lambda: {path: file_checksum(Path(path)) for path in requirements["files"]},
        "data": lambda: {prefix: corpus_identity(prefix, progress) for prefix in requirements["corpora"]},
        "disks": lambda: {path: free_bytes(Path(path)) for path in (requirements["run_dir"], requirements["nvme"])
                          if path},
        "limits": resource_limits,
        "memory": memory,
        "cores": lambda: len(os.sched_getaffinity(0)),
        "nvidia": nvidia_driver,
        "infiniband": lambda: _file_names(Path("/sys/class/infiniband")),
        "network": lambda: {"interfaces": interfaces(), "resolved": own_name_addresses()},
        "environment": lambda: env_forwarding.forwarded_variables(os.environ),
        "locks": build_locks,
        "port": free_port,
    }  # fmt: skip
    found: dict[str, Any] = {"host": socket.gethostname()}
    for name, collect_one in facts.items():
        progress(name)
        found[name] = collect_one()
    return found


def package_requirements() -> list[str]:
    """Return the requirements of megagpt without its extras, or an empty list if megagpt is not installed."""
    try:
        return [line for line in requires("megagpt") or [] if "extra ==" not in line]
    except PackageNotFoundError:
        return []


def package_versions() -> dict[str, str]:
    """Return the version of megagpt and of each package that it requires, or "" for packages that are not installed."""
    versions = {}
    for line in ["megagpt", *package_requirements()]:
        name = re.split(r"[^\w.-]", line)[0]
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    return versions


def code_checksum() -> dict[str, str]:
    """Return the folder of the megagpt package, and a checksum of all Python files in it."""
    folder, digest = Path(__file__).parent.parent, hashlib.blake2b(digest_size=4)
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return {"folder": str(folder), "checksum": digest.hexdigest()}


def file_checksum(path: Path) -> str:
    """Return a checksum of a file, or "" if it cannot be read."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=4).hexdigest()
    except OSError:
        return ""


def corpus_identity(prefix: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Return values that identify a corpus, without reading all of it.

    Args:
        prefix: Path of the corpus without .bin or .idx.
        progress: Function that is called with a description before each file is read.

    Returns:
        The sizes of .bin and .idx in bytes, the CRC-32 of the first and last MiB of both, and the checksums that the
        sidecar (.json) records. The list `missing` has an error message for each file that cannot be read.
    """
    found: dict[str, Any] = {"missing": [], "sizes": {}, "sidecar": None, "ends": 0}
    for suffix in (".bin", ".idx"):
        path = Path(prefix + suffix)
        progress(f"data, reading {path}")
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                for start in (0, max(0, size - _ENDS_BYTES)):
                    file.seek(start)
                    found["ends"] = zlib.crc32(file.read(_ENDS_BYTES), found["ends"])
            found["sizes"][suffix] = size
        except OSError as error:
            found["missing"].append(f"{path}: {error.strerror}")
    progress(f"data, reading {prefix}.json")
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        sidecar = parse_json(Path(prefix + ".json").read_text())
        found["sidecar"] = [sidecar["bin_crc32"], sidecar["idx_crc32"]]
    return found


def free_bytes(path: Path) -> int:
    """Return the free space, in bytes, of the disk on which `path` exists or would be created."""
    return shutil.disk_usage(next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())).free


def resource_limits() -> dict[str, Any]:
    """Return the resource limits of this process, which its ranks would inherit. None means unlimited."""

    def limits_of(kind: int) -> list[int | None]:
        return [None if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(kind)]

    capabilities = int(re.findall(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[0], 16)
    may_lock_all = capabilities >> _CAP_IPC_LOCK & 1
    return {
        "open_files": limits_of(resource.RLIMIT_NOFILE),
        "locked_memory": None if may_lock_all else limits_of(resource.RLIMIT_MEMLOCK)[0],
    }


def memory() -> dict[str, int]:
    """Return the total and the available memory in bytes. Neither exceeds the limit of this process's cgroup."""
    lines = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    total, available = int(lines["MemTotal"]) << 10, int(lines["MemAvailable"]) << 10
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        # The file of the other version of cgroups does not exist, and a file without a limit contains "max".
        with contextlib.suppress(OSError, ValueError):
            limit = int(Path(file).read_text())
            if limit < _CGROUP_UNLIMITED:
                total, available = min(total, limit), min(available, limit)
    return {"total": total, "available": available}


def nvidia_driver() -> dict[str, Any]:
    """Return the number of NVIDIA devices and the version of the driver, or 0 and "" without a driver."""
    text = ""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
    found = re.search(r"Kernel Module\D*([\d.]+)", text)
    devices = max(len(_file_names(Path("/proc/driver/nvidia/gpus"))), len(list(Path("/dev").glob("nvidia[0-9]*"))))
    return {"devices": devices, "driver": found[1] if found else ""}


def build_locks() -> list[dict[str, Any]]:
    """Return the lock files of DeepSpeed's operator builds, and whether a process on this host holds each of them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    paths = [path for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern)]
    return [{"path": str(path), "operator": path.parent.name, "building": bool(lock_holders(path))} for path in paths]


def lock_holders(lock: Path) -> list[int]:
    """Return the ids of the processes on this host that have a lock file open, as torch does during a build."""
    target, found = str(lock.resolve()), []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # The process may have ended, or may belong to another user.
            if os.readlink(link) == target:
                found.append(int(link.parts[2]))
    return found


def interfaces() -> dict[str, str]:
    """Return the IPv4 addresses of the network interfaces by name, in the system's order."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # The interface may have no IPv4 address.
                reply = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(reply[20:24])
    return found


def own_name_addresses() -> list[str]:
    """Return the addresses to which this host's own name resolves. Gloo and NCCL use them by default."""
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)})
    except OSError:
        return []


def external_interface(found: dict[str, str]) -> tuple[str, str]:
    """Return name and address of the first interface except the loopback, or empty strings if there is none.

    This is the address that `hostname -I` prints first.

    Args:
        found: Addresses by interface name, from `interfaces`.
    """
    return next(((name, address) for name, address in found.items() if not address.startswith("127.")), ("", ""))


class RunDirectoryMarker:
    """A file that this host writes into the run directory, to find out whether it is writable and shared.

    Args:
        run_dir: The run directory, which is created if it does not exist.
        session: Name of this session of the doctor.
        number: Number of this host.
    """

    def __init__(self, run_dir: Path, session: str, number: int) -> None:
        self._run_dir, self._prefix = run_dir, f".{session}-"
        self._file = run_dir / f"{self._prefix}{number}-{socket.gethostname()}"
        self._created = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]

    def write(self) -> dict[str, object]:
        """Write the marker. Returns the error message ("" on success), and whether the disk is full."""
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._file.write_bytes(_MARKER)
        except OSError as error:
            self.remove()
            return {"error": error.strerror or str(error), "full": error.errno in _DISK_FULL}
        return {"error": "", "full": False}

    def visible(self) -> list[int]:
        """Return the numbers of the hosts whose markers this host can see."""
        files = self._run_dir.glob(f"{self._prefix}*")
        return sorted(int(file.name.removeprefix(self._prefix).split("-")[0]) for file in files)

    def remove(self) -> None:
        """Remove the marker."""
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)

    def remove_folders(self) -> None:
        """Remove the folders that were created for the marker. All hosts must have removed their markers before."""
        for folder in self._created:
            with contextlib.suppress(OSError):  # The folder may be in use, or already removed by another host.
                folder.rmdir()


def _file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))
