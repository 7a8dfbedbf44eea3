"""Opens a file of the input, here or on a remote store, as plain bytes whatever it is compressed with."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from typing import IO, Any, cast

from megagpt.data.remote import is_remote, missing_package, open_remote
from megagpt.errors import UserError


class Compression(Enum):
    """How a file is compressed; the value is what its name usually ends with."""

    NONE = ""
    GZIP = ".gz"
    ZSTANDARD = ".zst"
    XZ = ".xz"
    BZIP2 = ".bz2"


_READ = 1 << 10  # bytes of a zstandard file at a time, which may become many thousand times as many
_MAGIC = {
    b"\x1f\x8b": Compression.GZIP,
    b"\x28\xb5\x2f\xfd": Compression.ZSTANDARD,
    b"\xfd7zXZ\0": Compression.XZ,
    b"BZh": Compression.BZIP2,
}


def detect_compression(head: bytes) -> Compression:
    """What the first bytes of a file say that it is compressed with."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), Compression.NONE)


@contextmanager
def open_decompressed(path: str, compression: Compression) -> Iterator[IO[bytes]]:
    """The content of a file, decompressed: all members or frames of it.

    Raises UserError when the file cannot be opened or read, or is damaged, also while it is read in the block.
    """
    try:
        with ExitStack() as stack:
            if is_remote(path):
                raw = stack.enter_context(open_remote(path))
            else:
                raw = stack.enter_context(Path(path).open("rb"))
            yield stack.enter_context(_decompressed(raw, compression, path))
    except OSError as error:
        # What decompresses raises OSError without a number; so do some stores where there is no such file.
        if error.errno is None and not isinstance(error, FileNotFoundError):
            raise _damaged(path, error) from None
        do = "check that it is there and that you may read it"
        raise UserError(f"cannot read the file: {error.strerror or error}", path, do) from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from None


def _decompressed(raw: IO[bytes], compression: Compression, path: str) -> IO[bytes]:
    if compression is Compression.GZIP:
        return cast("IO[bytes]", gzip.open(raw))
    if compression is Compression.BZIP2:
        return bz2.open(raw)
    if compression is Compression.XZ:
        return lzma.open(raw)
    if compression is Compression.ZSTANDARD:
        return cast("IO[bytes]", io.BufferedReader(_Zstandard(raw, path), 1 << 17))
    return raw


class _Zstandard(io.RawIOBase):
    """All frames of a zstandard file. The package's own reader takes a frame that was cut short for its end."""

    def __init__(self, raw: IO[bytes], path: str) -> None:
        try:
            import zstandard
        except ImportError:
            raise missing_package("zstandard", "zst", path) from None
        self._raw, self._error = raw, zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._begun = False  # a frame that has not ended
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while not self._left:
            block = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._begun = self._new(), False
            block = block or self._raw.read(_READ)
            if not block:
                if self._begun:
                    raise EOFError("the file ends within a frame")
                return 0
            self._begun = True
            try:
                self._left = memoryview(self._frame.decompress(block))
            except self._error as error:
                raise EOFError(str(error)) from None
        count = min(len(view), len(self._left))
        view[:count], self._left = self._left[:count], self._left[count:]
        return count


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(f"the compressed file is damaged or cut short: {error}", path, "copy or make it again")
