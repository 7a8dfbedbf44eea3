"""Reads the documents of an input range as text fragments, from text files, JSON Lines and Parquet files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from megagpt.errors import UserError
from megagpt.prepare.chunks import InputRange
from megagpt.prepare.input_warnings import InputLocation, InputWarnings
from megagpt.prepare.readers.decompress import open_decompressed
from megagpt.prepare.readers.default_corpus import default_corpus
from megagpt.prepare.readers.documents import TextFragment
from megagpt.prepare.readers.file_type import FileFormat
from megagpt.prepare.readers.long_json_line import LongJsonLine
from megagpt.prepare.readers.parquet import count_row_groups, read_rows
from megagpt.prepare.readers.utf8 import Utf8Decoder

_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 20  # number of bytes of a text file read at a time, and maximum characters of a text that is not split
_MAX_LINE = 1 << 22  # maximum bytes of a JSON line that is held in memory
_DECODER = json.JSONDecoder()
_LAST_SPLIT = re.compile("(?s:.*)(?:\n|[^ \u2581\n](?= ))")  # text up to the last offset at which it may be split


def read_fragments(
    part: InputRange, key: tuple[str, ...], warnings: InputWarnings, folder: Path | None = None
) -> Iterator[TextFragment]:
    """Yield the fragments of the documents of an input range.

    Args:
        part: The range to read.
        key: The keys that lead to the text in each JSON object or table row, outermost first.
        warnings: The warnings, to which everything that cannot be read as text and is skipped or replaced is added.
        folder: The folder for temporary files with the strings of long lines. If None, the system's folder for
            temporary files is used.

    Raises:
        UserError: The file cannot be read.
        InputError: A warning occurred, and `warnings.strict` is set.
    """
    file = part.file
    if file.format is FileFormat.DEFAULT_CORPUS:
        for document in default_corpus().documents:
            yield TextFragment(document.text, key=document.key)
    elif file.format is FileFormat.PARQUET:
        yield from _read_table(part, key, warnings)
    else:
        with open_decompressed(file.path, file.compression) as content:
            if file.format is FileFormat.TEXT:
                blocks = _decode_blocks(content, InputLocation(part.index, 0), warnings)
                yield from _split(blocks, TextFragment(""))
            else:
                yield from _read_lines(content, part, key, warnings, folder)


def parse_text_key(text_key: str) -> tuple[str, ...]:
    """Split a text key such as `a.b` at its dots. Raises UserError if one of the names is empty."""
    key = tuple(text_key.split("."))
    if "" in key:
        what = f"the text key `{text_key}` contains an empty name"
        raise UserError(what, "--text-key", "write one key, or several separated by dots, such as body.text")
    return key


def _decode_blocks(file: IO[bytes], location: InputLocation, warnings: InputWarnings) -> Iterator[str]:
    """Yield the text of a file, one block at a time."""
    decoder = Utf8Decoder()
    block = file.read(_BLOCK)
    if block.startswith(_BOM):
        warnings.add("byte_order_marks", location)
        block = block.removeprefix(_BOM)
    while block:
        text, invalid = decoder.decode(block)
        warnings.add("invalid_utf8", location, invalid)
        yield text
        block = file.read(_BLOCK)
    text, invalid = decoder.decode(b"", final=True)
    warnings.add("invalid_utf8", location, invalid)
    yield text


def _split(blocks: Iterable[str], document: TextFragment) -> Iterator[TextFragment]:
    """Split the text of a document, given in blocks, into fragments with the line and key of `document`."""
    pending = ""  # text after the last offset at which the document was split
    for block in blocks:
        searched = max(len(pending) - 1, 0)  # all pending characters except the last one have been searched
        pending += block
        if match := _LAST_SPLIT.match(pending, searched):
            yield document._replace(text=pending[: match.end()], is_last=False)
            pending = pending[match.end() :]
    yield document._replace(text=pending)


def _split_if_long(text: str, line: int) -> Iterable[TextFragment]:
    """Return the fragments of the document in a line or row.

    Long documents are split, because encoding takes many times their size in memory.
    """
    if len(text) <= _BLOCK:
        return (TextFragment(text, line=line),)
    blocks = (text[start : start + _BLOCK] for start in range(0, len(text), _BLOCK))
    return _split(blocks, TextFragment("", line=line))


def _read_lines(
    file: IO[bytes], part: InputRange, key: tuple[str, ...], warnings: InputWarnings, folder: Path | None
) -> Iterator[TextFragment]:
    """Yield the documents of the JSON lines that begin in the range."""
    offset = _seek_first_line(file, part)
    number = 0
    # Lines are read as bytes, so that only \n ends a line. str.splitlines would also split a text at U+2028.
    while (part.end is None or offset < part.end) and (line := file.readline(_MAX_LINE)):
        number += 1
        location = InputLocation(part.index, number)
        if offset == 0 and line.startswith(_BOM):
            warnings.add("byte_order_marks", location)
            line = line.removeprefix(_BOM)
            offset = len(_BOM)
        if len(line) + len(_BOM) < _MAX_LINE or line.endswith(b"\n"):
            offset += len(line)
            text = _text_of_line(line, key, location, warnings)
            if text is not None:
                yield from _split_if_long(text, number)
            continue
        with LongJsonLine(line, file, folder) as long_line:
            offset += long_line.size
            warnings.add("invalid_utf8", location, long_line.invalid_utf8)
            text = _parse(long_line.skeleton, key, location, warnings, long_line.column)
            if text is not None:
                yield from _split(long_line.read_string(text), TextFragment("", line=number))
    warnings.lines[part.index] = number


def _seek_first_line(file: IO[bytes], part: InputRange) -> int:
    """Move to the first line that begins in the range, and return the offset of the line.

    If no line begins in the range, return an offset at or after the end of the range.
    """
    if not part.start:
        return 0
    offset = file.seek(part.start - 1)  # if a line begins at `start`, the byte before it is a newline
    while (part.end is None or offset < part.end) and (block := file.readline(_BLOCK)):
        offset += len(block)
        if block.endswith(b"\n"):
            break
    return offset


def _text_of_line(raw: bytes, key: tuple[str, ...], location: InputLocation, warnings: InputWarnings) -> str | None:
    """Return the text of a JSON line. If the line has no text, add a warning and return None."""
    try:
        line = raw.decode()
    except UnicodeDecodeError:
        line, invalid = Utf8Decoder().decode(raw, final=True)
        warnings.add("invalid_utf8", location, invalid)
    return _parse(line, key, location, warnings, lambda offset: offset + 1)


def _parse(
    line: str, key: tuple[str, ...], location: InputLocation, warnings: InputWarnings, column: Callable[[int], int]
) -> str | None:
    """Return the string at `key` in a JSON line. If there is none, add a warning and return None.

    `column` converts offsets in `line` to columns, for error messages.
    """
    if line.isspace():
        return None
    try:
        # The newline is removed because an error at the end would otherwise be reported after the newline.
        value = _load_json(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        detail = f"{error.msg.removesuffix(' at')} at column {column(error.pos)}"
        warnings.add("broken_json", location, detail=detail)
        return None
    except ValueError as error:  # for example an integer with thousands of digits
        warnings.add("broken_json", location, detail=str(error))
        return None
    except RecursionError:
        warnings.add("broken_json", location, detail="nested too deeply")
        return None
    for name in key:
        if not isinstance(value, dict) or name not in value:
            return _check_text(False, None, key, location, warnings)
        value = value[name]
    return _check_text(True, value, key, location, warnings)


def _load_json(line: str) -> Any:
    """Return `json.loads(line)`.

    Objects take about half the time of `json.loads`, because the search for surrounding whitespace is skipped.
    """
    if line[:1] == "{":
        value, end = _DECODER.raw_decode(line)
        if end == len(line):
            return value
    return json.loads(line)


def _read_table(part: InputRange, key: tuple[str, ...], warnings: InputWarnings) -> Iterator[TextFragment]:
    """Yield the documents of the row groups in the range. Locations have the number of the row in the whole file."""
    path = part.file.path
    end = count_row_groups(path) if part.end is None else part.end
    for row in read_rows(path, part.start, end, key):
        location = InputLocation(part.index, row.number)
        warnings.add("invalid_utf8", location, row.invalid_utf8)
        text = _check_text(row.has_value, row.value, key, location, warnings)
        if text is not None:
            yield from _split_if_long(text, row.number)


def _check_text(
    has_value: bool, value: Any, key: tuple[str, ...], location: InputLocation, warnings: InputWarnings
) -> str | None:
    """Return the value if it is a string. Otherwise add a warning and return None."""
    if not has_value:
        warnings.add("no_text", location, detail=f'no key "{".".join(key)}"')
        return None
    if not isinstance(value, str):
        warnings.add("not_a_string", location, detail=f"it is {json.dumps(value, default=str)[:30]}")
        return None
    return value
