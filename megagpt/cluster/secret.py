"""The secret of a job, which its processes share and which no other user can read.

The secret is either in the environment variable MEGAGPT_JOB_SECRET or in a key file, and never on a command line. The
variable is forwarded by srun and mpirun, and only the user and root can read it from a process. The key file is written
by rank 0 into a folder that all hosts can read. It belongs to this user, has mode 0600, also contains the address and
port of rank 0, and is removed as soon as all processes have connected.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import MachineError, UserError
from megagpt.files import parse_json

VARIABLE = "MEGAGPT_JOB_SECRET"
HOW_TO_SET = (
    f"export {VARIABLE}=$(openssl rand -hex 32) before the launcher starts the processes, which must forward it"
)
# Minimum number of characters of the variable. An eavesdropper could find a shorter secret by trying all of them.
_MIN_LENGTH = 32
_MAX_BYTES = 4096  # maximum size of a key file in bytes


@dataclass(frozen=True)
class JobKey:
    """The secret of a job, and the address and port of its rank 0."""

    secret: bytes
    address: str
    port: int


def from_environment(env: Mapping[str, str]) -> bytes | None:
    """Return the secret in MEGAGPT_JOB_SECRET, or None if it is not set. Raises UserError if it is too short."""
    text = env.get(VARIABLE, "")
    if not text:
        return None
    if len(text) < _MIN_LENGTH:
        raise UserError(
            f"{VARIABLE} has {len(text)} characters, at least {_MIN_LENGTH} are needed", VARIABLE, HOW_TO_SET
        )
    return text.encode()


def state_folder(env: Mapping[str, str]) -> Path:
    """Return this user's folder for the key files of commands that have no output folder (in XDG_STATE_HOME)."""
    base = env.get("XDG_STATE_HOME", "")
    return Path(base if base.startswith("/") else Path.home() / ".local" / "state") / "megagpt"


def key_file_name(purpose: str, job: str, port: int) -> str:
    """Return the name of a job's key file, which is the same for all processes of the job and no other job."""
    return f"{purpose}.{re.sub(r'[^A-Za-z0-9_.-]', '_', job)[:100]}.{port}.key"


def publish_key(path: Path, key: JobKey) -> None:
    """Write the key file. Replaces a file that an earlier job of the same name has left behind.

    Args:
        path: Path of the key file.
        key: Secret, address and port that the other processes need.

    Raises:
        UserError: The filesystem does not protect the file from other users.
        MachineError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    content = {"secret": key.secret.hex(), "address": key.address, "port": key.port}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                if why := _unsafe(os.fstat(descriptor)):
                    raise UserError(f"a file here cannot be kept from others: {why}", str(path.parent), HOW_TO_SET)
                json.dump(content, file)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise MachineError(f"cannot write the key of this job: {error.strerror}", str(path), HOW_TO_SET) from None


def read_key(path: Path) -> JobKey | str:
    """Return the content of a key file, or the reason why it does not exist (yet) or cannot be trusted."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return "it does not exist"
    except OSError as error:
        return str(error.strerror)
    with os.fdopen(descriptor, "rb") as file:
        if why := _unsafe(os.fstat(descriptor)):
            return why
        try:
            content = parse_json(file.read(_MAX_BYTES))
            secret, address, port = bytes.fromhex(content["secret"]), content["address"], content["port"]
        except (OSError, ValueError, TypeError, KeyError):
            return "it is not a key file"
    if len(secret) != 32 or not isinstance(address, str) or not isinstance(port, int) or not 0 < port < 65536:
        return "it is not a key file"
    return JobKey(secret, address, port)


def remove_key(path: Path) -> None:
    """Remove the key file if it exists."""
    path.unlink(missing_ok=True)


def _unsafe(status: os.stat_result) -> str:
    """Return the reason why another user may have written or read a key file, or "" if no other user can."""
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, this process to user {os.geteuid()}"
    if status.st_mode & 0o077:
        return f"its mode is {stat.S_IMODE(status.st_mode):04o}"
    return ""
