"""Reads remote files, such as `s3://bucket/part.jsonl`, with fsspec."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from typing import IO, Any, TypeVar, cast

from megagpt.errors import UserError

_BUFFER = 1 << 20
_T = TypeVar("_T")


def is_remote(path: str) -> bool:
    """Return True if a path is the address of a remote file."""
    return "://" in path


def open_filesystem(path: str) -> tuple[Any, str]:
    """Return the fsspec file system of a remote path, and the path within it.

    Raises UserError if the file system is unavailable.
    """
    try:
        import fsspec
    except ImportError:
        raise missing_package("fsspec", "remote", path) from None
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:  # the store's own package is missing, or the protocol is unknown
        raise UserError(f"cannot open this store: {error}", path, "install the package that it needs") from None
    return filesystem, inner


def is_http(filesystem: Any) -> bool:
    """Return True for the file system of web servers. They have no folders, and some of them send only whole files."""
    return "http" in filesystem.protocol


def open_remote(path: str) -> IO[bytes]:
    """Open a remote file. All errors of opening and reading it are raised as OSError."""
    return cast("IO[bytes]", io.BufferedReader(_RemoteFile(*open_filesystem(path)), _BUFFER))


def supports_ranges(path: str) -> bool:
    """Return True if a remote file has a known size and can be read from any offset.

    Raises OSError if the file cannot be read.
    """
    filesystem, inner = open_filesystem(path)
    with _RemoteFile(filesystem, inner) as file:
        if not file.is_streamed:
            file.seek(1)
            file.read(1)
        return not file.is_streamed


def missing_package(package: str, extra: str, path: str) -> UserError:
    """Return the error for a file that cannot be read because an optional package is missing.

    Args:
        package: The name of the package.
        extra: The name of the megagpt extra that installs the package.
        path: The path of the file.
    """
    return UserError(f"reading this needs the package {package}", path, f'pip install "megagpt[{extra}]"')


class _RemoteFile(io.RawIOBase):
    """Remote file that is read range by range, or streamed as a whole if the web server does not support ranges."""

    def __init__(self, filesystem: Any, inner: str) -> None:
        self._filesystem, self._inner = filesystem, inner
        self._offset = 0
        self.is_streamed = False
        self._file = _with_os_errors(lambda: filesystem.open(inner, "rb"))
        if is_http(filesystem) and self._file.size is None:
            _with_os_errors(self._stream)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset, whence = self._offset + offset, io.SEEK_SET
        if (offset, whence) != (self._offset, io.SEEK_SET):
            self._offset = int(_with_os_errors(lambda: self._file.seek(offset, whence)))
        return self._offset

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        block = _with_os_errors(lambda: self._read(len(view)))
        view[: len(block)] = block
        self._offset += len(block)
        return len(block)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _read(self, count: int) -> bytes:
        try:
            return bytes(self._file.read(count))
        except ValueError:  # raised by fsspec if the server ignores the requested range
            if self.is_streamed or not is_http(self._filesystem):
                raise
        self._stream()
        return bytes(self._file.read(count))

    def _stream(self) -> None:
        """Reopen the file as a stream from its beginning, and skip to the current offset."""
        import aiohttp

        self._file.close()
        self.is_streamed = True
        # The total time is not limited, because reads alternate with the encoding of documents. The limit of 300
        # seconds applies to each read.
        timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
        client_kwargs = {**self._filesystem.client_kwargs, "timeout": timeout}
        filesystem = type(self._filesystem)(**{**self._filesystem.storage_options, "client_kwargs": client_kwargs})
        self._file = filesystem.open(self._inner, "rb", block_size=0)
        remaining = self._offset
        while remaining and (skipped := len(self._file.read(min(remaining, _BUFFER)))):
            remaining -= skipped


def _with_os_errors(call: Callable[[], _T]) -> _T:
    """Return the result of `call`. Exceptions of the store's package are converted to OSError."""
    try:
        return call()
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
