"""Errors for people: what was wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_RUNNING = 3  # of `megagpt status` alone: neither well nor ill yet
EXIT_REQUEUE = 75  # stopped and saved: sysexits.h's EX_TEMPFAIL, which schedulers requeue on


# C0 and C1 control characters but tab and line feed, what turns the direction of text, and lone surrogates
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def without_controls(text: str, colours: bool = False) -> str:
    """Return text with U+FFFD in place of what a terminal obeys rather than shows.

    Args:
        text: Text of which parts may come from anybody: a corpus, a file's name, another program's message.
        colours: Keep sequences that only change colours.
    """
    parts = _COLOUR.split(text) if colours else [text]
    return "".join(part if number % 2 else _CONTROLS.sub("\ufffd", part) for number, part in enumerate(parts))


@dataclass(frozen=True)
class Problem:
    """One mistake: what is wrong, where it stands (`file:line key`), and what to do."""

    what: str
    where: str = ""
    do: str = ""

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  {line}" for line in self.where.splitlines()]
        if self.do:
            lines.append(f"  do: {self.do}")
        return without_controls("\n".join(lines))


class UserError(Exception):
    """A mistake of the user's: printed without a traceback, exit code 2.

    Carries one problem or several, so that all mistakes of a file are reported at once.
    """

    exit_code = EXIT_USER

    def __init__(self, what: str, where: str = "", do: str = "", *, others: Sequence[Problem] = ()) -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, where, do), *others)
        super().__init__(what, where, do)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> UserError:
        """Build one error from one or more problems."""
        first = problems[0]
        return cls(first.what, first.where, first.do, others=problems[1:])

    def __str__(self) -> str:
        return "\n".join(f"megagpt: {problem}" for problem in self.problems)


class MachineError(UserError):
    """A failure of the machine's, such as a full disk: told like a user's mistake, but exit code 1."""

    exit_code = EXIT_FAILURE


def need_linux(what: str) -> None:
    """Raise UserError on another system: what follows would fail in the middle, at a call that only Linux has."""
    if sys.platform != "linux":
        raise UserError(
            f"{what} needs Linux, and this is {sys.platform}", "", "use WSL 2 on Windows, a virtual machine on macOS"
        )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, or None if none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
