"""Files on a store, such as `s3://bucket/part.jsonl`, through fsspec."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from typing import IO, Any, cast

from megagpt.errors import UserError

_BUFFER = 1 << 20


def is_remote(path: str) -> bool:
    """Whether a path names a store."""
    return "://" in path


def open_filesystem(path: str) -> tuple[Any, str]:
    """The file system of fsspec for a remote path, and the path within it. Raises UserError where it cannot be used."""
    try:
        import fsspec
    except ImportError:
        raise missing_package("fsspec", "remote", path) from None
    try:
        system, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:  # the store's own package is missing, or there is no such store
        raise UserError(f"cannot open this store: {error}", path, "install what it asks for") from None
    return system, inner


def is_http(system: Any) -> bool:
    """Whether a file system is of web servers, which have no folders, and of which some only send whole files."""
    return "http" in system.protocol


def open_remote(path: str) -> IO[bytes]:
    """Open a remote file. Whatever goes wrong is an OSError, then and later."""
    return cast("IO[bytes]", io.BufferedReader(_File(*open_filesystem(path)), _BUFFER))


def supports_ranges(path: str) -> bool:
    """Whether a remote file of some size can be read from the middle on. Raises OSError."""
    system, inner = open_filesystem(path)
    with _File(system, inner) as file:
        if not file.streams:
            file.seek(1)
            file.read(1)
        return not file.streams


def missing_package(package: str, extra: str, path: str) -> UserError:
    """Say that a file needs a package of an extra."""
    return UserError(f"reading this needs the package {package}", path, f'pip install "megagpt[{extra}]"')


class _File(io.RawIOBase):
    """A file that is asked for part by part; where a web server only sends the whole, it `streams`."""

    def __init__(self, system: Any, inner: str) -> None:
        self._system, self._inner, self._at, self.streams = system, inner, 0, False
        self._file = _tried(lambda: system.open(inner, "rb"))
        if is_http(system) and self._file.size is None:
            _tried(self._stream)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset, whence = self._at + offset, io.SEEK_SET
        if (offset, whence) != (self._at, io.SEEK_SET):
            self._at = int(_tried(lambda: self._file.seek(offset, whence)))
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        block = _tried(lambda: self._read(len(view)))
        view[: len(block)] = block
        self._at += len(block)
        return len(block)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _read(self, count: int) -> bytes:
        try:
            return bytes(self._file.read(count))
        except ValueError:
            if self.streams or not is_http(self._system):
                raise
        self._stream()
        return bytes(self._file.read(count))

    def _stream(self) -> None:
        """Go on with the whole file as it comes, from where we are."""
        import aiohttp

        self._file.close()
        self.streams = True
        # No limit to the whole, in seconds: what is read waits for what is worked on.
        patient = {**self._system.client_kwargs, "timeout": aiohttp.ClientTimeout(total=None, sock_read=300)}
        system = type(self._system)(**{**self._system.storage_options, "client_kwargs": patient})
        self._file = system.open(self._inner, "rb", block_size=0)
        left = self._at
        while left and (skipped := len(self._file.read(min(left, _BUFFER)))):
            left -= skipped


def _tried(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except OSError:
        raise
    except Exception as error:  # of the store's own package
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
