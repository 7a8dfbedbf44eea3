"""Reader for JSON lines that are too long to hold in memory.

Long strings are moved to a temporary file. The skeleton is the rest of the line, with a marker in place of each long
string. The skeleton is valid JSON if and only if the line is. `json.loads` can therefore parse the skeleton, or report
the error in it, as it would for a short line.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from megagpt.errors import MachineError
from megagpt.prepare.readers.utf8 import Utf8Decoder

BLOCK_BYTES = 1 << 20  # number of bytes read at a time
_MAX_INLINE = 4096  # maximum length in characters of a string that stays in the skeleton
# Number of characters at the beginning of a long string that stay in the skeleton, because error messages quote them.
_HEAD = 256
# Sequence of characters and escape sequences. A string may be split between any two of them. The escape sequence of a
# high surrogate is complete only if the next character or escape sequence is complete as well.
_UNITS = re.compile(
    r"""(?: [^"\\]+ | \\[^u] | \\u(?![dD][89abAB]).{4} | \\u[dD][89abAB]..(?=[^\\]|\\[^u]|\\u.{4}) )*""",
    re.DOTALL | re.VERBOSE,
)


class LongJsonLine:
    """JSON line whose long strings are stored in an unnamed temporary file for the duration of the `with` block.

    Attributes:
        skeleton: The text of the line, with a marker in place of each long string.
        size: The size of the whole line in bytes.
        invalid_utf8: The number of invalid UTF-8 sequences in the line. Each is replaced by U+FFFD.
    """

    def __init__(self, head: bytes, file: IO[bytes], folder: Path | None) -> None:
        """Read the line to its end.

        Args:
            head: The beginning of the line, which has already been read.
            file: The file from which the rest of the line is read.
            folder: The folder of the temporary file. If None, the system's folder for temporary files is used.

        Raises:
            MachineError: The temporary file cannot be written.
        """
        self._marker = secrets.token_hex(16)  # random, so that no text contains it
        self._folder = folder or Path(tempfile.gettempdir())
        self._parts: list[str] = []  # consecutive parts of the skeleton
        self._length = 0  # length of the skeleton so far, in characters
        # For each marker, its offset in the skeleton and the number of characters by which its string is longer.
        self._shifts: list[tuple[int, int]] = []
        self._ends: list[int] = []  # offset of the end of each string in the temporary file, in bytes
        self._pending = ""  # text that cannot be processed until more of the line is read
        self._in_string = False
        self._in_moved_string = False  # True while the current string is being moved to the file
        self._is_invalid = False
        try:
            self._store: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed with the block
        except OSError as error:
            raise self._write_error(error) from None
        self.size = self.invalid_utf8 = 0
        try:
            self._read(head, file)
        except BaseException:
            self.__exit__()
            raise
        self.skeleton = "".join(self._parts)

    def __enter__(self) -> LongJsonLine:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # if the disk is full, the write has already raised an error
            self._store.close()

    def column(self, offset: int) -> int:
        """Convert an offset in the skeleton to a column in the original line, counted from 1."""
        return offset + 1 + sum(longer for marker, longer in self._shifts if marker < offset)

    def read_string(self, value: str) -> Iterator[str]:
        """Yield the full text of a string, in blocks.

        Args:
            value: The string as `json.loads` returned it for the skeleton.
        """
        head, marker, number = value.partition(self._marker)
        yield head
        if marker:
            index = int(number)
            start = self._ends[index - 1] if index else 0
            end = self._ends[index]
            decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
            self._store.seek(start)
            for offset in range(start, end, BLOCK_BYTES):
                yield decoder.decode(self._store.read(min(BLOCK_BYTES, end - offset)))

    def _read(self, block: bytes, file: IO[bytes]) -> None:
        decoder, at_end = Utf8Decoder(), False
        while not at_end:
            self.size += len(block)
            at_end = not block or block.endswith(b"\n")
            text, invalid = decoder.decode(block, final=at_end)
            self.invalid_utf8 += invalid
            if not self._is_invalid:
                self._scan(self._pending + text)
            block = b"" if at_end else file.readline(BLOCK_BYTES)
        if not self._is_invalid:
            self._keep(self._pending)

    def _scan(self, text: str) -> None:
        """Process the next text of the line. Text that cannot be processed yet is stored in `_pending`."""
        offset = 0
        self._pending = ""
        while offset < len(text):
            if not self._in_string:
                quote = text.find('"', offset)
                end = len(text) if quote < 0 else quote + 1
                self._keep(text[offset:end])
                self._in_string, self._in_moved_string = quote >= 0, False
                offset = end
                continue
            end = _end_of_units(text, offset)
            is_closed = text[end : end + 1] == '"'
            if not is_closed and end - offset <= _MAX_INLINE:
                self._pending = text[offset:]
                return
            self._add_to_string(text[offset:end], is_closed)
            if self._is_invalid:
                return
            if not is_closed:
                self._pending = text[end:]
                return
            self._keep('"')
            self._in_string = False
            offset = end + 1

    def _add_to_string(self, content: str, is_closed: bool) -> None:
        """Add content to the current string. If `is_closed`, the string ends after this content."""
        if not self._in_moved_string:
            if is_closed and len(content) <= _MAX_INLINE:
                self._keep(content)
                return
            head = _end_of_units(content[:_HEAD], 0)
            self._keep(content[:head])
            content = content[head:]
        try:
            raw = json.loads(f'"{content}"').encode("utf-8", "surrogatepass")
        except json.JSONDecodeError:
            # json.loads will reject the skeleton here or earlier, so the rest of the line is irrelevant.
            self._keep(content)
            self._is_invalid = True
            return
        if not self._in_moved_string:
            self._begin_moved_string()
        marker, longer = self._shifts[-1]
        self._shifts[-1] = (marker, longer + len(content))
        self._ends[-1] += len(raw)
        try:
            self._store.write(raw)
            self._store.flush()
        except OSError as error:
            raise self._write_error(error) from None

    def _begin_moved_string(self) -> None:
        marker = f"{self._marker}{len(self._ends)}"
        self._shifts.append((self._length, -len(marker)))
        self._keep(marker)
        self._ends.append(self._ends[-1] if self._ends else 0)
        self._in_moved_string = True

    def _keep(self, text: str) -> None:
        """Append text to the skeleton."""
        self._parts.append(text)
        self._length += len(text)

    def _write_error(self, error: OSError) -> MachineError:
        what = f"cannot store the text of a long line: {error.strerror}"
        return MachineError(what, str(self._folder), "free space there, then run the command again")


def _end_of_units(text: str, start: int) -> int:
    """Return the last offset in `text` at which a string that continues at `start` may be split.

    If the string ends within `text`, return the offset of its closing quote.
    """
    return _UNITS.match(text, start).end()  # type: ignore[union-attr]  # the pattern also matches the empty string
