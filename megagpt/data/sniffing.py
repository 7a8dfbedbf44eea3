"""What kind of file one is: by its content first, since names lie, then by its name."""

from __future__ import annotations

import codecs
import re
from enum import Enum
from pathlib import PurePath

from megagpt.data.opening import Compression, compression_of, opened
from megagpt.errors import UserError
from megagpt.files import parse_json


class Kind(Enum):
    """How a file holds documents."""

    TEXT = "text"  # one document
    LINES = "lines"  # a JSON object a line
    PARQUET = "parquet"  # a row of a table
    DEFAULT = "default"  # the default corpus, which is no file


_SUFFIXES = {
    ".txt": Kind.TEXT,
    ".md": Kind.TEXT,
    ".jsonl": Kind.LINES,
    ".ndjson": Kind.LINES,
    ".json": Kind.LINES,
    ".parquet": Kind.PARQUET,
}
KNOWN = ".txt, .md, .jsonl, .parquet (also .gz, .zst, .xz, .bz2)"
_HEAD = 1 << 16  # bytes that are looked at
_OBJECT = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:')  # how one begins
_ONE_VALUE = re.compile(rb"(\xef\xbb\xbf)?\s*(\[\s*\{|\{\s*\n)")  # a list of objects, or one over several lines


def known_name(name: str) -> bool:
    """Whether a file of this name is taken out of a folder."""
    return _by_name(name) is not None


def looked_at(path: str) -> tuple[Kind, Compression]:
    """What the file is. Raises UserError for what cannot be read, or holds no text."""
    with opened(path, Compression.NONE) as file:
        head = file.read(_HEAD)
    compression = compression_of(head)
    if compression is not Compression.NONE:
        with opened(path, compression) as file:
            head = file.read(_HEAD)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        do = "convert it: iconv --from-code UTF-16 --to-code UTF-8 FILE (or UTF-32)"
        raise UserError("this text is UTF-16 or UTF-32, not UTF-8", path, do)
    if head.startswith(b"PAR1"):
        if compression is not Compression.NONE:
            raise UserError("a parquet file within a compressed one is not read", path, "decompress it")
        return Kind.PARQUET, compression
    named = _by_name(path)
    if named is Kind.LINES and _ONE_VALUE.match(head):
        do = "write each document as a line: jq --compact-output '.[]' FILE (or '.', if it is no list)"
        raise UserError("this is one JSON value, not one a line", path, do)
    if named is not Kind.LINES and _begins_with_an_object(head):
        return Kind.LINES, compression
    if named is Kind.PARQUET or (named is None and _is_binary(head)):
        suffix = PurePath(path).suffix or "no ending"
        do = f"give {KNOWN} files, or a file of text under any name"
        raise UserError(f"this is neither text nor parquet ({suffix})", path, do)
    return named or Kind.TEXT, compression


def _by_name(path: str) -> Kind | None:
    suffixes = [suffix.lower() for suffix in PurePath(path).suffixes]
    if suffixes and suffixes[-1] in [kind.value for kind in Compression if kind.value]:
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


def _begins_with_an_object(head: bytes) -> bool:
    """Whether the first line is a JSON object, the sign of JSON lines; of a line that goes on, whether it begins so."""
    line, ended, _ = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if not ended and len(head) == _HEAD:
        return _OBJECT.match(line.decode(errors="replace")) is not None
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _is_binary(head: bytes) -> bool:
    """Whether it holds what no text does: NUL, or much that is not UTF-8."""
    broken = head.decode(errors="replace").count("\ufffd")
    return b"\0" in head or head.startswith(b"%PDF") or broken > len(head) // 20
