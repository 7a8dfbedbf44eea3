"""Detects the format and compression of a file.

The content takes precedence over the name of the file, because names can be wrong.
"""

from __future__ import annotations

import codecs
import re
from enum import Enum
from pathlib import PurePath

from megagpt.errors import UserError
from megagpt.files import parse_json
from megagpt.prepare.readers.decompress import Compression, detect_compression, open_decompressed


class FileFormat(Enum):
    """Format in which a file contains documents."""

    TEXT = "text"  # one document per file
    JSONL = "lines"  # one JSON object per line
    PARQUET = "parquet"  # one table row per document
    DEFAULT_CORPUS = "default"  # the default corpus, which is not a file


_SUFFIXES = {
    ".txt": FileFormat.TEXT,
    ".md": FileFormat.TEXT,
    ".jsonl": FileFormat.JSONL,
    ".ndjson": FileFormat.JSONL,
    ".json": FileFormat.JSONL,
    ".parquet": FileFormat.PARQUET,
}
SUPPORTED_SUFFIXES = ".txt, .md, .jsonl, .parquet (also .gz, .zst, .xz, .bz2)"
_HEAD_BYTES = 1 << 16  # number of bytes at the beginning of a file from which the format is detected
_OBJECT_START = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:')
# Beginning of a list of objects, or of an object on several lines.
_SINGLE_VALUE = re.compile(rb"(\xef\xbb\xbf)?\s*(\[\s*\{|\{\s*\n)")


def has_supported_suffix(name: str) -> bool:
    """Return True if a file with this name is read if its folder is given as input."""
    return _format_by_name(name) is not None


def detect_format(path: str) -> tuple[FileFormat, Compression]:
    """Return the format and compression of a file. Raises UserError if it is unreadable or contains no text."""
    with open_decompressed(path, Compression.NONE) as file:
        head = file.read(_HEAD_BYTES)
    compression = detect_compression(head)
    if compression is not Compression.NONE:
        with open_decompressed(path, compression) as file:
            head = file.read(_HEAD_BYTES)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        do = "convert it: iconv --from-code UTF-16 --to-code UTF-8 FILE (or UTF-32)"
        raise UserError("this text is UTF-16 or UTF-32, not UTF-8", path, do)
    if head.startswith(b"PAR1"):
        if compression is not Compression.NONE:
            raise UserError("a compressed parquet file cannot be read", path, "decompress it")
        return FileFormat.PARQUET, compression
    named = _format_by_name(path)
    if named is FileFormat.JSONL and _SINGLE_VALUE.match(head):
        do = "write one document per line: jq --compact-output '.[]' FILE (or '.' if it is not a list)"
        raise UserError("this file is a single JSON value, not one per line", path, do)
    if named is not FileFormat.JSONL and _starts_with_object(head):
        return FileFormat.JSONL, compression
    if named is FileFormat.PARQUET or (named is None and _is_binary(head)):
        suffix = PurePath(path).suffix or "no suffix"
        do = f"use {SUPPORTED_SUFFIXES} files, or a text file with any name"
        raise UserError(f"this file is neither text nor parquet ({suffix})", path, do)
    return named or FileFormat.TEXT, compression


def _format_by_name(path: str) -> FileFormat | None:
    suffixes = [suffix.lower() for suffix in PurePath(path).suffixes]
    if suffixes and suffixes[-1] in [compression.value for compression in Compression if compression.value]:
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


def _starts_with_object(head: bytes) -> bool:
    """Return True if the first line is a JSON object. If the line is longer than `head`, check only its beginning."""
    line, newline, _ = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if not newline and len(head) == _HEAD_BYTES:
        return _OBJECT_START.match(line.decode(errors="replace")) is not None
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _is_binary(head: bytes) -> bool:
    """Return True if the content is not text.

    Content is not text if it contains a NUL byte, has the signature of a PDF file, or is more than 5% invalid UTF-8.
    """
    invalid = head.decode(errors="replace").count("\ufffd")
    return b"\0" in head or head.startswith(b"%PDF") or invalid > len(head) // 20
