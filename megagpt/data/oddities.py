"""What was unusual in the input: counted by kind, with the first place of each; or, when strict, an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from megagpt.errors import UserError

WARNING_KINDS: Mapping[str, str] = {
    "broken_json": "lines that are not JSON, passed over",
    "no_text": "documents without text under the key, passed over",
    "not_a_string": "documents whose text is no string, passed over",
    "invalid_utf8": "places that are not UTF-8, now U+FFFD",
    "lone_surrogates": "lone surrogates, now U+FFFD",
    "byte_order_marks": "byte order marks at the head of a file, removed",
    "nul": "NUL characters, kept",
    "lower_blocks": "characters U+2581, which come back as blanks",
    "control_symbols": "spellings of a control symbol, kept as text",
    "empty": "empty documents, passed over",
    "blank": "documents of nothing but blanks, kept",
    "long": "documents of more than 2³¹ tokens, split into several sequences",
}


class InputLocation(NamedTuple):
    """Where something stands: a file of the input by its number, and a line that counts from 1 (0: the file)."""

    source: int
    line: int


class LocatedError(Exception):
    """A failure at a place of the input, the name of which is known when all that was read before it is counted."""

    def __init__(self, place: InputLocation, *more: object) -> None:
        super().__init__(place, *more)
        self.place = place

    def to_user_error(self, where: str) -> UserError:
        """The error for people; `where` is the name of the place."""
        raise NotImplementedError


class InputError(LocatedError):
    """The first oddity, when oddities are errors. `detail` says more than its kind, such as the JSON error."""

    def __init__(self, place: InputLocation, kind: str, detail: str = "") -> None:
        super().__init__(place, kind, detail)
        self.kind, self.detail = kind, detail

    def to_user_error(self, where: str) -> UserError:
        """The error for people."""
        what = f"odd input: {WARNING_KINDS[self.kind].split(', ')[0]}" + (f": {self.detail}" if self.detail else "")
        return UserError(what, where, "mend it, or leave out --strict to have such counted")


@dataclass
class InputWarnings:
    """Counts by kind, and the first place of each kind.

    A place's line counts from where reading began in that file. `lines` says how many were read of each, so that
    lines can be counted from the top of a file that was read in several stretches.
    """

    strict: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, InputLocation] = field(default_factory=dict)
    lines: dict[int, int] = field(default_factory=dict)

    def note(self, kind: str, place: InputLocation, count: int = 1, detail: str = "") -> None:
        """Count `count` more of `kind` at a place, if any. Raises InputError when strict."""
        if not count:
            return
        if self.strict:
            raise InputError(place, kind, detail)
        self.counts[kind] = self.counts.get(kind, 0) + count
        self.first.setdefault(kind, place)
