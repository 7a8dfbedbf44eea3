"""JSON lines too long to be held in memory: long strings are put aside on the disk while a line is read.

What is left of the line, its skeleton, has a mark in place of each. It is as good or as broken JSON as the line, and
json.loads says what it holds or what is wrong with it, so that a long line means what a short one does.
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

from megagpt.data.decoding import Utf8Decoder
from megagpt.errors import MachineError

BLOCK = 1 << 20  # bytes read at a time
_LONG, _HEAD = 4096, 256  # characters of a string that is put aside, and of its beginning that stays: messages show it
# What a string may be cut between: characters and escapes, of which a high surrogate waits for what comes next.
_UNITS = re.compile(
    r"""(?: [^"\\]+ | \\[^u] | \\u(?![dD][89abAB]).{4} | \\u[dD][89abAB]..(?=[^\\]|\\[^u]|\\u.{4}) )*""",
    re.DOTALL | re.VERBOSE,
)


class LongJsonLine:
    """A line that begins with `head`, read to its end within the `with` block.

    `skeleton` is text; `size` (bytes) is the whole line's, and `broken` counts its places that are no UTF-8. Strings
    lie in `folder` meanwhile (None: where temporary files do), in a file without a name. Raises MachineError where they
    cannot.
    """

    def __init__(self, head: bytes, file: IO[bytes], folder: Path | None) -> None:
        self._mark = secrets.token_hex(16)  # which no text holds
        self._folder = folder or Path(tempfile.gettempdir())
        self._parts: list[str] = []
        self._length = 0  # of the skeleton so far
        self._shifts: list[tuple[int, int]] = []  # where marks stand, and how much longer is what they stand for
        self._ends: list[int] = []  # of strings in the file, in bytes
        self._rest, self._in_string, self._aside, self._failed = "", False, False, False
        try:
            self._store: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed with the block
        except OSError as error:
            raise self._cannot_write(error) from None
        self.size = self.broken = 0
        try:
            self._read(head, file)
        except BaseException:
            self.__exit__()
            raise
        self.skeleton = "".join(self._parts)

    def __enter__(self) -> LongJsonLine:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a full disk, which the error on its way has said
            self._store.close()

    def column(self, place: int) -> int:
        """Where in the line, from 1, the character at a place of the skeleton stands."""
        return place + 1 + sum(longer for at, longer in self._shifts if at < place)

    def text(self, value: str) -> Iterator[str]:
        """The whole of a string that json.loads found in the skeleton, in stretches."""
        head, mark, number = value.partition(self._mark)
        yield head
        if mark:
            begin, end = [0, *self._ends][int(number)], self._ends[int(number)]
            decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
            self._store.seek(begin)
            for at in range(begin, end, BLOCK):
                yield decoder.decode(self._store.read(min(BLOCK, end - at)))

    def _read(self, block: bytes, file: IO[bytes]) -> None:
        decoder, ended = Utf8Decoder(), False
        while not ended:
            self.size += len(block)
            ended = not block or block.endswith(b"\n")
            text, broken = decoder.decode(block, final=ended)
            self.broken += broken
            if not self._failed:
                self._add(self._rest + text)
            block = b"" if ended else file.readline(BLOCK)
        if not self._failed:
            self._keep(self._rest)

    def _add(self, text: str) -> None:
        """Take in the next stretch; what of it cannot be judged yet is the `_rest`."""
        at, self._rest = 0, ""
        while at < len(text):
            if not self._in_string:
                quote = text.find('"', at)
                end = len(text) if quote < 0 else quote + 1
                self._keep(text[at:end])
                self._in_string, self._aside, at = quote >= 0, False, end
                continue
            end = _whole_units(text, at)
            closed = text[end : end + 1] == '"'
            if not closed and end - at <= _LONG:
                self._rest = text[at:]
                return
            self._string(text[at:end], closed)
            if self._failed:
                return
            at = end
            if not closed:
                self._rest = text[at:]
                return
            self._keep('"')
            self._in_string, at = False, at + 1

    def _string(self, content: str, closed: bool) -> None:
        """The next stretch of a string, up to its end if it is `closed`."""
        if not self._aside:
            if closed and len(content) <= _LONG:
                self._keep(content)
                return
            head = _whole_units(content[:_HEAD], 0)
            self._keep(content[:head])
            content = content[head:]
        try:
            raw = json.loads(f'"{content}"').encode("utf-8", "surrogatepass")
        except json.JSONDecodeError:
            # json.loads fails here too, or before: what follows is not looked at.
            self._keep(content)
            self._failed = True
            return
        if not self._aside:
            mark = f"{self._mark}{len(self._ends)}"
            self._shifts.append((self._length, -len(mark)))
            self._keep(mark)
            self._ends.append(self._ends[-1] if self._ends else 0)
            self._aside = True
        place, longer = self._shifts[-1]
        self._shifts[-1] = place, longer + len(content)
        self._ends[-1] += len(raw)
        try:
            self._store.write(raw)
            self._store.flush()
        except OSError as error:
            raise self._cannot_write(error) from None

    def _keep(self, text: str) -> None:
        self._parts.append(text)
        self._length += len(text)

    def _cannot_write(self, error: OSError) -> MachineError:
        what = f"cannot put the text of a long line aside: {error.strerror}"
        return MachineError(what, str(self._folder), "make room there, then type the command again")


def _whole_units(text: str, start: int) -> int:
    """Where the string that goes on at `start` ends, or the last place where it may be cut."""
    return _UNITS.match(text, start).end()  # type: ignore[union-attr]  # it matches nothing, too
