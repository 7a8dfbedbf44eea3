"""Is the run directory writable here, and the others' too? Each host leaves a token, and looks for all of them."""

from __future__ import annotations

import contextlib
import errno
import socket
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT}
_CONTENT = b"megagpt doctor\n" * 512  # more than a file system keeps beside a file's name: a full disk shows


class Token:
    """A file of this host's in the run directory, which is made for it, and taken away again, if it is not there."""

    def __init__(self, run: Path, name: str, number: int) -> None:
        self._run, self._name = run, name
        self._file = run / f".{name}-{number}-{socket.gethostname()}"
        self._made = [folder for folder in (run, *run.parents) if not folder.exists()]

    def write(self) -> dict[str, object]:
        """Leave the token; why not, if that fails."""
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            self._file.write_bytes(_CONTENT)
        except OSError as error:
            self.remove()
            return {"error": error.strerror or str(error), "full": error.errno in _FULL}
        return {"error": "", "full": False}

    def seen(self) -> list[int]:
        """The numbers of the hosts whose tokens are seen here."""
        start = f".{self._name}-"
        return sorted(int(file.name[len(start) :].split("-")[0]) for file in self._run.glob(f"{start}*"))

    def remove(self) -> None:
        """Take the token away."""
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)

    def remove_folders(self) -> None:
        """Take away the folders that were made for it, once all hosts have taken their tokens away."""
        for folder in self._made:
            with contextlib.suppress(OSError):  # another host is first, or somebody else is in it
                folder.rmdir()
