"""Warnings about unusual input.

Warnings are counted by kind, with the first location of each kind. With --strict, the first one is raised as an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megagpt.errors import UserError
from megagpt.prepare.readers.inputs import InputFile

WARNING_KINDS: Mapping[str, str] = {
    "broken_json": "lines that are not valid JSON, skipped",
    "no_text": "documents without the text key, skipped",
    "not_a_string": "documents whose text is not a string, skipped",
    "invalid_utf8": "invalid UTF-8 sequences, replaced by U+FFFD",
    "lone_surrogates": "lone surrogates, replaced by U+FFFD",
    "byte_order_marks": "byte order marks at the start of a file, removed",
    "nul": "NUL characters, kept",
    "lower_blocks": "characters U+2581, which decode to spaces",
    "control_symbols": "control symbols spelled out in a text, kept as text",
    "empty": "empty documents, which have no tokens",
    "blank": "documents of whitespace only, kept",
    "long": "documents of more than 2³¹ tokens, split into several sequences",
}
"""Kinds of warnings, in the order in which they are reported. Each text states the finding and how it was handled."""


class InputLocation(NamedTuple):
    """Location in the input: the index of a file, and a line number counted from 1 (0 for the file as a whole)."""

    file: int
    line: int


class LocatedError(Exception):
    """Error at a location of the input.

    The line number in the whole file is known only after the lines of all earlier ranges of that file are counted.
    """

    def __init__(self, location: InputLocation, *args: object) -> None:
        super().__init__(location, *args)
        self.location = location

    def to_user_error(self, where: str) -> UserError:
        """Return the user-facing error. `where` is the location as `file` or `file:line`."""
        raise NotImplementedError


class InputError(LocatedError):
    """Error for the first unusual input under --strict.

    Attributes:
        kind: The kind of the unusual input, a key of `WARNING_KINDS`.
        detail: Further information, for example the JSON parser's message.
    """

    def __init__(self, location: InputLocation, kind: str, detail: str = "") -> None:
        super().__init__(location, kind, detail)
        self.kind, self.detail = kind, detail

    def to_user_error(self, where: str) -> UserError:
        """Return the user-facing error. `where` is the location as `file` or `file:line`."""
        what = f"unusual input: {WARNING_KINDS[self.kind].split(', ')[0]}"
        if self.detail:
            what += f": {self.detail}"
        return UserError(what, where, "correct the input, or omit --strict to count such input as a warning")


@dataclass
class InputWarnings:
    """Warnings about one chunk of the input.

    Line numbers count from the start of the chunk's range of each file. If a file is read in several ranges, the line
    numbers in the whole file are computed from `lines`.

    Attributes:
        strict: If True, warnings are raised as errors.
        counts: The number of warnings of each kind.
        first: The first location of each kind.
        lines: The number of lines that were read from each file, by the index of the file.
    """

    strict: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, InputLocation] = field(default_factory=dict)
    lines: dict[int, int] = field(default_factory=dict)

    def add(self, kind: str, location: InputLocation, count: int = 1, detail: str = "") -> None:
        """Add warnings of one kind.

        Args:
            kind: The kind of the warnings, a key of `WARNING_KINDS`.
            location: The location of the warnings.
            count: The number of warnings. If it is 0, the call has no effect.
            detail: Further information for the error message.

        Raises:
            InputError: `strict` is set, and `count` is not 0.
        """
        if not count:
            return
        if self.strict:
            raise InputError(location, kind, detail)
        self.counts[kind] = self.counts.get(kind, 0) + count
        self.first.setdefault(kind, location)


@dataclass(frozen=True)
class WarningCount:
    """Number of warnings of one kind in the whole input, and their first location (`file` or `file:line`)."""

    kind: str
    count: int
    first: str

    def __str__(self) -> str:
        where = f" (first: {self.first})" if self.first else ""
        return f"warning: {WARNING_KINDS[self.kind]}: {self.count:,}{where}"


def summarize_warnings(chunks: Iterable[InputWarnings], files: Sequence[InputFile]) -> tuple[WarningCount, ...]:
    """Add up the warnings of all chunks, and convert their line numbers to those in the whole files.

    Args:
        chunks: The warnings of each chunk, in the order of the chunks.
        files: The files of the input.

    Returns:
        One entry per kind that occurred, in the order of `WARNING_KINDS`.
    """
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    lines: Counter[int] = Counter()
    for chunk in chunks:
        counts.update(chunk.counts)
        for kind, location in chunk.first.items():
            first.setdefault(kind, _format_location(location, lines, files))
        lines.update(chunk.lines)
    return tuple(WarningCount(kind, counts[kind], first[kind]) for kind in WARNING_KINDS if counts[kind])


def locate_error(error: LocatedError, earlier: Iterable[InputWarnings], files: Sequence[InputFile]) -> UserError:
    """Convert a located error to a user-facing error with the line number in the whole file.

    Args:
        error: The error that occurred in a chunk.
        earlier: The warnings of the earlier chunks, which include their line counts.
        files: The files of the input.
    """
    lines: Counter[int] = Counter()
    for chunk in earlier:
        lines.update(chunk.lines)
    return error.to_user_error(_format_location(error.location, lines, files))


def _format_location(location: InputLocation, earlier_lines: Mapping[int, int], files: Sequence[InputFile]) -> str:
    path = files[location.file].path
    return f"{path}:{earlier_lines.get(location.file, 0) + location.line}" if location.line else path
