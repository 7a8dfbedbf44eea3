"""Fragments of documents out of the stretches of the input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from megagpt.data.decoding import Utf8Decoder
from megagpt.data.default_corpus import default_corpus
from megagpt.data.documents import TextFragment
from megagpt.data.long_line import LongJsonLine
from megagpt.data.oddities import InputLocation, InputWarnings
from megagpt.data.opening import open_decompressed
from megagpt.data.parquet import count_row_groups, read_rows
from megagpt.data.pieces import InputRange
from megagpt.data.sniffing import FileFormat
from megagpt.errors import UserError

_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 20  # bytes of a text file read at a time, and characters of a text that are left in one
_LONGEST = 1 << 22  # bytes of a JSON line that is held in memory
_DECODER = json.JSONDecoder()
_CUT = re.compile("(?s:.*)(?:\n|[^ \u2581\n](?= ))")  # up to the last place where a document may be fragmented


def read_fragments(
    stretch: InputRange, key: tuple[str, ...], odd: InputWarnings, folder: Path | None = None
) -> Iterator[TextFragment]:
    """Fragments of the documents of a stretch. `key` leads to the text in each JSON line.

    What cannot be read as text is noted in `odd` and passed over or replaced. Long lines lie in `folder` meanwhile
    (None: where temporary files do). Raises UserError where the file cannot be read at all, InputError where `odd` is
    strict.
    """
    source = stretch.source
    if source.kind is FileFormat.DEFAULT_CORPUS:
        for document in default_corpus().documents:
            yield TextFragment(document.text, key=document.key)
    elif source.kind is FileFormat.PARQUET:
        yield from _rows(stretch, key, odd)
    else:
        with open_decompressed(source.path, source.compression) as file:
            if source.kind is FileFormat.TEXT:
                yield from _text(file, InputLocation(stretch.number, 0), odd)
            else:
                yield from _lines(file, stretch, key, odd, folder)


def parse_text_key(text_key: str) -> tuple[str, ...]:
    """The names that a text key, such as `a.b`, leads through. Raises UserError where one is empty."""
    key = tuple(text_key.split("."))
    if "" in key:
        what = f"the text key `{text_key}` holds an empty name"
        raise UserError(what, "--text-key", "write a key, or several with a dot between them: body.text")
    return key


def _text(file: IO[bytes], place: InputLocation, odd: InputWarnings) -> Iterator[TextFragment]:
    """A file that is one document."""
    yield from _fragments(_decoded(file, place, odd), TextFragment(""))


def _decoded(file: IO[bytes], place: InputLocation, odd: InputWarnings) -> Iterator[str]:
    """The text of a file, a block at a time."""
    decoder = Utf8Decoder()
    block = file.read(_BLOCK)
    if block.startswith(_BOM):
        odd.note("byte_order_marks", place)
        block = block.removeprefix(_BOM)
    while block:
        text, broken = decoder.decode(block)
        odd.note("invalid_utf8", place, broken)
        yield text
        block = file.read(_BLOCK)
    text, broken = decoder.decode(b"", final=True)
    odd.note("invalid_utf8", place, broken)
    yield text


def _fragments(blocks: Iterable[str], document: TextFragment) -> Iterator[TextFragment]:
    """A document's text, which comes in blocks, in fragments that are the `document`'s."""
    begun = ""  # what came after the last cut
    for block in blocks:
        looked_at = max(len(begun) - 1, 0)  # up to its last character there is no place to cut
        begun += block
        if cut := _CUT.match(begun, looked_at):
            yield document._replace(text=begun[: cut.end()], last=False)
            begun = begun[cut.end() :]
    yield document._replace(text=begun)


def _of_line(text: str, number: int) -> Iterable[TextFragment]:
    """The document of a line or row; a long one in fragments, as what is worked on takes many times its size."""
    if len(text) <= _BLOCK:
        return (TextFragment(text, line=number),)
    return _fragments((text[at : at + _BLOCK] for at in range(0, len(text), _BLOCK)), TextFragment("", line=number))


def _lines(
    file: IO[bytes], stretch: InputRange, key: tuple[str, ...], odd: InputWarnings, folder: Path | None
) -> Iterator[TextFragment]:
    """The documents of the lines that begin in the stretch."""
    at, number = _first_line(file, stretch), 0
    # Bytes, cut at \n only: str.splitlines would also cut at U+2028 inside a text.
    while (stretch.end is None or at < stretch.end) and (line := file.readline(_LONGEST)):
        number += 1
        place = InputLocation(stretch.number, number)
        if at == 0 and line.startswith(_BOM):
            odd.note("byte_order_marks", place)
            line, at = line.removeprefix(_BOM), len(_BOM)
        if len(line) + len(_BOM) < _LONGEST or line.endswith(b"\n"):
            at += len(line)
            text = _text_of(line, key, place, odd)
            if text is not None:
                yield from _of_line(text, number)
            continue
        with LongJsonLine(line, file, folder) as long:
            at += long.size
            odd.note("invalid_utf8", place, long.broken)
            text = _value(long.skeleton, key, place, odd, long.column)
            if text is not None:
                yield from _fragments(long.text(text), TextFragment("", line=number))
    odd.lines[stretch.number] = number


def _first_line(file: IO[bytes], stretch: InputRange) -> int:
    """Where the first line that begins in the stretch does: there the file is then, if there is one."""
    if not stretch.start:
        return 0
    at = file.seek(stretch.start - 1)  # one byte before, which ends a line if one begins at `start`
    while (stretch.end is None or at < stretch.end) and (block := file.readline(_BLOCK)):
        at += len(block)
        if block.endswith(b"\n"):
            break
    return at


def _text_of(raw: bytes, key: tuple[str, ...], place: InputLocation, odd: InputWarnings) -> str | None:
    """The text of a JSON line; None, and a note, where it has none."""
    try:
        line = raw.decode()
    except UnicodeDecodeError:
        line, broken = Utf8Decoder().decode(raw, final=True)
        odd.note("invalid_utf8", place, broken)
    return _value(line, key, place, odd, lambda at: at + 1)


def _value(
    line: str, key: tuple[str, ...], place: InputLocation, odd: InputWarnings, column: Callable[[int], int]
) -> str | None:
    """The string that the key leads to; None, and a note, where there is none. `column` of a place is for people."""
    if line.isspace():
        return None
    try:
        value = _parsed(line.rstrip("\r\n"))  # or what is missing at the end would be found on the next line
    except json.JSONDecodeError as error:
        odd.note("broken_json", place, detail=f"{error.msg.removesuffix(' at')} at column {column(error.pos)}")
        return None
    except ValueError as error:  # a number of thousands of digits
        odd.note("broken_json", place, detail=str(error))
        return None
    except RecursionError:
        odd.note("broken_json", place, detail="nested too deeply")
        return None
    for name in key:
        if not isinstance(value, dict) or name not in value:
            return _string(False, None, key, place, odd)
        value = value[name]
    return _string(True, value, key, place, odd)


def _parsed(line: str) -> Any:
    """As `json.loads`, half of whose time goes into looking for blanks."""
    if line[:1] == "{":
        value, end = _DECODER.raw_decode(line)
        if end == len(line):
            return value
    return json.loads(line)


def _rows(stretch: InputRange, key: tuple[str, ...], odd: InputWarnings) -> Iterator[TextFragment]:
    """The documents of row groups of a table. A place's line is the row's number in the whole file."""
    path = stretch.source.path
    end = count_row_groups(path) if stretch.end is None else stretch.end
    for row in read_rows(path, stretch.start, end, key):
        place = InputLocation(stretch.number, row.number)
        odd.note("invalid_utf8", place, row.broken)
        text = _string(row.there, row.value, key, place, odd)
        if text is not None:
            yield from _of_line(text, row.number)


def _string(there: bool, value: Any, key: tuple[str, ...], place: InputLocation, odd: InputWarnings) -> str | None:
    """The value if it is a string; None, and a note, if not, or if there was none."""
    if not there:
        odd.note("no_text", place, detail=f'no key "{".".join(key)}"')
        return None
    if not isinstance(value, str):
        odd.note("not_a_string", place, detail=f"it is {json.dumps(value, default=str)[:30]}")
        return None
    return value
