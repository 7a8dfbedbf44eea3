"""Reader for JSON lines that are too long to hold in memory: long strings are moved to a temporary file.

The rest of the line, its skeleton, contains a marker in place of each long string. The skeleton is valid JSON exactly
if the line is, and `json.loads` reads the skeleton or reports what is wrong with it. A long line is therefore treated
in the same way as a short one.
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

BLOCK_BYTES = 1 << 20  # bytes read at a time
_MAX_INLINE = 4096  # longer strings, in characters, are moved to the file
_HEAD = 256  # first characters of such a string, which stay in the skeleton because error messages quote them
# Characters and escape sequences between which a string may be split. A high surrogate is complete only together with
# what follows it.
_UNITS = re.compile(
    r"""(?: [^"\\]+ | \\[^u] | \\u(?![dD][89abAB]).{4} | \\u[dD][89abAB]..(?=[^\\]|\\[^u]|\\u.{4}) )*""",
    re.DOTALL | re.VERBOSE,
)


class LongJsonLine:
    """A JSON line whose long strings are stored in an unnamed temporary file for the duration of the `with` block.

    Attributes:
        skeleton: The line as text, with a marker in place of each long string.
        size: Bytes of the whole line.
        invalid_utf8: Number of invalid UTF-8 sequences in the line, each replaced by U+FFFD.
    """

    def __init__(self, head: bytes, file: IO[bytes], folder: Path | None) -> None:
        """Read the line to its end.

        Args:
            head: The beginning of the line, already read.
            file: The file from which the rest of the line is read.
            folder: The folder of the temporary file; None means the system's folder for temporary files.

        Raises:
            MachineError: The temporary file cannot be written.
        """
        self._marker = secrets.token_hex(16)  # random, so that no text contains it
        self._folder = folder or Path(tempfile.gettempdir())
        self._parts: list[str] = []  # of the skeleton
        self._length = 0  # characters of the skeleton so far
        # Each marker's offset in the skeleton, and the number of characters that it is shorter than its string.
        self._shifts: list[tuple[int, int]] = []
        self._ends: list[int] = []  # where each string ends in the temporary file, in bytes
        self._pending = ""  # text that cannot be interpreted before more of the line is read
        self._in_string = False
        self._in_moved_string = False  # the current string is being written to the file
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
        """Return the column in the original line, counted from 1, of the character at `offset` in the skeleton."""
        return offset + 1 + sum(longer for marker, longer in self._shifts if marker < offset)

    def read_string(self, value: str) -> Iterator[str]:
        """Yield, in blocks, the full text of a string that `json.loads` returned for the skeleton."""
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
        """Process the next text of the line, and leave in `_pending` what cannot be interpreted yet."""
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
        """Add content to the current string, which ends after it if `is_closed`."""
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
            # json.loads of the skeleton will fail here or earlier, so that the rest of the line is irrelevant.
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
    """Return the last offset at which the string that continues at `start` may be split, or where it ends."""
    return _UNITS.match(text, start).end()  # type: ignore[union-attr]  # the pattern also matches the empty string
