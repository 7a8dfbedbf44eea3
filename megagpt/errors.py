"""Errors for users: what is wrong, where, and what to do about it. Also the exit codes."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_RUNNING = 3  # only from `megagpt status`: training has not ended
EXIT_REQUEUE = 75  # stopped after saving: EX_TEMPFAIL of sysexits.h, on which schedulers requeue


# C0 and C1 control characters except tab and line feed, characters that change text direction, and lone surrogates
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def without_controls(text: str, colours: bool = False) -> str:
    """Return text with U+FFFD in place of characters that a terminal interprets instead of showing.

    Args:
        text: text with parts from untrusted sources: a corpus, a file name, another program's message.
        colours: keep escape sequences that only change colors.
    """
    parts = _COLOUR.split(text) if colours else [text]
    return "".join(part if number % 2 else _CONTROLS.sub("\ufffd", part) for number, part in enumerate(parts))


@dataclass(frozen=True)
class Problem:
    """One mistake: what is wrong, where (`FILE:LINE  key`), and what to do."""

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
    """A mistake of the user's, printed without a traceback. The exit code is 2.

    Holds one or more problems, so that all mistakes in a file can be reported at once.

    Args:
        what: what is wrong.
        where: where it is wrong, such as `FILE:LINE  key`.
        do: what to do about it.
        others: further problems.
    """

    exit_code = EXIT_USER

    def __init__(self, what: str, where: str = "", do: str = "", *, others: Sequence[Problem] = ()) -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, where, do), *others)
        super().__init__(what, where, do)

    @classmethod
    def from_problems(cls, problems: Sequence[Problem]) -> UserError:
        """Return one error with one or more problems."""
        first = problems[0]
        return cls(first.what, first.where, first.do, others=problems[1:])

    def __str__(self) -> str:
        return "\n".join(f"megagpt: {problem}" for problem in self.problems)


class MachineError(UserError):
    """A failure of the machine, such as a full disk. It is printed like a user's mistake, but the exit code is 1."""

    exit_code = EXIT_FAILURE


def require_linux(what: str) -> None:
    """Raise UserError unless this is Linux. Otherwise `what` would fail later, in a Linux-only system call."""
    if sys.platform != "linux":
        raise UserError(
            f"{what} needs Linux, but this is {sys.platform}", "", "use WSL 2 on Windows, or a virtual machine on macOS"
        )


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, such as "1 rank" or "2 ranks"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def closest_match(name: str, known: Iterable[str], cutoff: float = 0.75) -> str | None:
    """Return the known name most similar to `name`, or None if none is similar: a wrong remedy is worse than none.

    Args:
        name: a name that does not exist.
        known: the names that do.
        cutoff: least likeness, from 0 to 1; 0.75 allows one wrong letter of four.
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None
