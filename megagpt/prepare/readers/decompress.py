"""Opens local and remote input files, and decompresses those in the formats gzip, zstandard, xz and bzip2."""

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

from megagpt.errors import UserError
from megagpt.prepare.readers.remote import is_remote, missing_package, open_remote


class Compression(Enum):
    """Compression format of a file. The value is the usual file name suffix of the format."""

    NONE = ""
    GZIP = ".gz"
    ZSTANDARD = ".zst"
    XZ = ".xz"
    BZIP2 = ".bz2"


# Number of compressed bytes of a zstandard file that are decompressed at a time. The number is small because the bytes
# can expand many thousandfold.
_ZSTANDARD_BLOCK = 1 << 10
_XZ_MEMORY = 1 << 28  # memory limit in bytes for decompressing an xz file; `xz -9` needs a quarter of it
_XZ_BLOCK = 1 << 16  # number of compressed bytes of an xz file that are read at a time
_MAGIC = {
    b"\x1f\x8b": Compression.GZIP,
    b"\x28\xb5\x2f\xfd": Compression.ZSTANDARD,
    b"\xfd7zXZ\0": Compression.XZ,
    b"BZh": Compression.BZIP2,
}


def detect_compression(head: bytes) -> Compression:
    """Detect the compression of a file from its first bytes."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), Compression.NONE)


@contextmanager
def open_decompressed(path: str, compression: Compression) -> Iterator[IO[bytes]]:
    """Open a file for reading, and decompress all of its members, streams or frames.

    Args:
        path: A local path, or the address of a remote file.
        compression: The compression of the file.

    Yields:
        The decompressed content of the file.

    Raises:
        UserError: The file cannot be opened or read, or is damaged. Read errors within the `with` block are converted
            to UserError as well.
    """
    try:
        with ExitStack() as stack:
            if is_remote(path):
                raw = stack.enter_context(open_remote(path))
            else:
                raw = stack.enter_context(Path(path).open("rb"))
            yield stack.enter_context(_decompress(raw, compression, path))
    except OSError as error:
        # Decompressors raise OSError without an errno if a file is damaged. Some remote stores raise FileNotFoundError
        # without an errno.
        if error.errno is None and not isinstance(error, FileNotFoundError):
            raise _damaged(path, error) from None
        do = "check that it exists and that you have permission to read it"
        raise UserError(f"cannot read the file: {error.strerror or error}", path, do) from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from None


def _decompress(raw: IO[bytes], compression: Compression, path: str) -> IO[bytes]:
    if compression is Compression.GZIP:
        return cast("IO[bytes]", gzip.open(raw))
    if compression is Compression.BZIP2:
        return bz2.open(raw)
    if compression is Compression.XZ:
        return cast("IO[bytes]", io.BufferedReader(_XzReader(raw, path), 1 << 17))
    if compression is Compression.ZSTANDARD:
        return cast("IO[bytes]", io.BufferedReader(_ZstandardReader(raw, path), 1 << 17))
    return raw


class _XzReader(io.RawIOBase):
    """Reads all streams of an xz file with limited memory. `lzma.open` can allocate up to 4 GiB for some files."""

    def __init__(self, raw: IO[bytes], path: str) -> None:
        self._raw, self._path = raw, path
        self._stream = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
        self._at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while not self._at_end:
            block = b""
            is_new_stream = self._stream.eof
            if is_new_stream:
                block = self._start_next_stream()
                if not block:
                    continue
            elif self._stream.needs_input:
                block = self._raw.read(_XZ_BLOCK)
                if not block:
                    raise EOFError("the file ends within a stream")
            text = self._decompress(block, len(view), is_new_stream)
            if text:
                view[: len(text)] = text
                return len(text)
        return 0

    def _start_next_stream(self) -> bytes:
        """Skip the padding after a stream, and return the first bytes of the next stream.

        At the end of the file, return b"".
        """
        block = self._stream.unused_data
        while not (block := block.lstrip(b"\0")):
            block = self._raw.read(_XZ_BLOCK)
            if not block:
                self._at_end = True
                return b""
        self._stream = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
        return block

    def _decompress(self, block: bytes, max_length: int, is_new_stream: bool) -> bytes:
        try:
            return self._stream.decompress(block, max_length)
        except lzma.LZMAError as error:
            if "Memory usage limit" in str(error):
                what = f"decompressing this file takes more than {_XZ_MEMORY >> 20} MiB of memory"
                raise UserError(what, self._path, "compress it again, with `xz -9` or less") from None
            if not is_new_stream:
                raise
            self._at_end = True  # the data after the last stream is not xz, and is ignored as in the lzma module
            return b""


class _ZstandardReader(io.RawIOBase):
    """Reads all frames of a zstandard file. The `zstandard` package's own reader accepts a truncated last frame."""

    def __init__(self, raw: IO[bytes], path: str) -> None:
        try:
            import zstandard
        except ImportError:
            raise missing_package("zstandard", "zst", path) from None
        self._raw, self._error = raw, zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._in_frame = False
        self._decompressed = memoryview(b"")  # decompressed bytes that have not been read yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while not self._decompressed:
            block = b""
            if self._frame.eof:
                block = self._frame.unused_data
                self._frame = self._new_frame()
                self._in_frame = False
            block = block or self._raw.read(_ZSTANDARD_BLOCK)
            if not block:
                if self._in_frame:
                    raise EOFError("the file ends within a frame")
                return 0
            self._in_frame = True
            try:
                self._decompressed = memoryview(self._frame.decompress(block))
            except self._error as error:
                raise EOFError(str(error)) from None
        count = min(len(view), len(self._decompressed))
        view[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count


def _damaged(path: str, error: Exception) -> UserError:
    do = "copy or create it again"
    return UserError(f"the compressed file is damaged or truncated: {error}", path, do)
