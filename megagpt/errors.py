"""Exit codes, and errors with what is wrong, where it is, and what to do about it."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_RUNNING = 3  # Only `megagpt status` returns this, for a run that is still training.
EXIT_REQUEUE = 75  # The run was stopped after saving. Schedulers requeue jobs with this code (EX_TEMPFAIL, sysexits.h).


# C0 and C1 control characters except tab and line feed, characters that change the text direction, and lone surrogates.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def without_controls(text: str, colours: bool = False) -> str:
    """Replace each character that a terminal would interpret rather than show. The replacement is U+FFFD.

    Args:
        text: text that may come from an untrusted source, such as a corpus, a file name or another program.
        colours: whether to keep escape sequences that only change colors.

    Returns:
        The text, which is safe to print.
    """
    parts = _COLOUR.split(text) if colours else [text]
    return "".join(part if number % 2 else _CONTROLS.sub("\ufffd", part) for number, part in enumerate(parts))


@dataclass(frozen=True)
class Problem:
    """Description of one mistake: what is wrong, where it is (`FILE:LINE  key`), and what to do about it."""

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
    """Raised for a mistake by the user. It is printed without a traceback, and the exit code is 2.

    An error holds one or more problems, so that all mistakes in a file can be reported at once.

    Args:
        what: description of what is wrong.
        where: location of the mistake, such as `FILE:LINE  key`.
        do: advice on what to do about it.
        others: additional problems.
    """

    exit_code = EXIT_USER

    def __init__(self, what: str, where: str = "", do: str = "", *, others: Sequence[Problem] = ()) -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, where, do), *others)
        super().__init__(what, where, do)

    @classmethod
    def from_problems(cls, problems: Sequence[Problem]) -> UserError:
        """Return a single error that holds all of `problems`, of which there must be at least one."""
        first = problems[0]
        return cls(first.what, first.where, first.do, others=problems[1:])

    def __str__(self) -> str:
        return "\n".join(f"megagpt: {problem}" for problem in self.problems)


class MachineError(UserError):
    """Raised for a failure of the machine, such as a full disk. It is printed like a UserError. The exit code is 1."""

    exit_code = EXIT_FAILURE


def require_linux(what: str) -> None:
    """Raise UserError if the system is not Linux, because `what` uses system calls that exist only on Linux."""
    if sys.platform != "linux":
        raise UserError(
            f"{what} needs Linux, but this is {sys.platform}", "", "use WSL 2 on Windows, or a virtual machine on macOS"
        )


def plural(count: int, noun: str) -> str:
    """Return a count with its noun in the singular or plural, such as "1 rank" or "2 ranks"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def closest_match(name: str, known: Iterable[str], cutoff: float = 0.75) -> str | None:
    """Return the known name that is most similar to `name`, or None if no name is similar enough.

    Args:
        name: a name that does not exist.
        known: the existing names.
        cutoff: minimum similarity, from 0 to 1. For example, 0.75 allows one wrong letter in four.
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None
