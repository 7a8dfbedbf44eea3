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

from megagpt.data.remote import is_remote, missing, remote_file
from megagpt.errors import UserError


class Compression(Enum):
    """How a file is compressed; the value is what its name usually ends with."""

    NONE = ""
    GZIP = ".gz"
    ZSTANDARD = ".zst"
    XZ = ".xz"
    BZIP2 = ".bz2"


_READ = 1 << 10  # bytes of a zstandard file at a time, which may become many thousand times as many
_XZ_MEMORY = 1 << 28  # bytes; `xz -9` needs a quarter of that
_XZ_READ = 1 << 16
_MAGIC = {
    b"\x1f\x8b": Compression.GZIP,
    b"\x28\xb5\x2f\xfd": Compression.ZSTANDARD,
    b"\xfd7zXZ\0": Compression.XZ,
    b"BZh": Compression.BZIP2,
}


def compression_of(head: bytes) -> Compression:
    """What the first bytes of a file say that it is compressed with."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), Compression.NONE)


@contextmanager
def opened(path: str, compression: Compression) -> Iterator[IO[bytes]]:
    """The content of a file, decompressed: all members or frames of it.

    Raises UserError when the file cannot be opened or read, or is damaged, also while it is read in the block.
    """
    try:
        with ExitStack() as stack:
            if is_remote(path):
                raw = stack.enter_context(remote_file(path))
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
        return cast("IO[bytes]", io.BufferedReader(_Xz(raw, path), 1 << 17))
    if compression is Compression.ZSTANDARD:
        return cast("IO[bytes]", io.BufferedReader(_Zstandard(raw, path), 1 << 17))
    return raw


class _Zstandard(io.RawIOBase):
    """All frames of a zstandard file. The package's own reader takes a frame that was cut short for its end."""

    def __init__(self, raw: IO[bytes], path: str) -> None:
        try:
            import zstandard
        except ImportError:
            raise missing("zstandard", "zst", path) from None
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


class _Xz(io.RawIOBase):
    """All streams of an xz file. `lzma.open` would take up to 4 GiB, as much as the file asks for."""

    def __init__(self, raw: IO[bytes], path: str) -> None:
        self._raw, self._path = raw, path
        self._stream = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while not self._ended:
            block, fresh = b"", self._stream.eof
            if fresh:
                block = self._next_stream()
            elif self._stream.needs_input:
                block = self._raw.read(_XZ_READ)
                if not block:
                    raise EOFError("the file ends within a stream")
            if not (fresh and not block) and (text := self._decompress(block, len(view), fresh)):
                view[: len(text)] = text
                return len(text)
        return 0

    def _next_stream(self) -> bytes:
        """The first bytes of the next stream, after padding; none if there is no other stream."""
        block = self._stream.unused_data
        while not (block := block.lstrip(b"\0")):
            if not (block := self._raw.read(_XZ_READ)):
                self._ended = True
                return b""
        self._stream = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
        return block

    def _decompress(self, block: bytes, most: int, fresh: bool) -> bytes:
        try:
            return self._stream.decompress(block, most)
        except lzma.LZMAError as error:
            if "Memory usage limit" in str(error):
                what = f"decompressing this file takes more than {_XZ_MEMORY >> 20} MiB of memory"
                raise UserError(what, self._path, "compress it again, with `xz -9` or less") from None
            if not fresh:
                raise
            self._ended = True  # what follows the last stream is not xz: the lzma module passes over it, too
            return b""


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(f"the compressed file is damaged or cut short: {error}", path, "copy or make it again")
