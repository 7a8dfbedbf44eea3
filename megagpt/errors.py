"""Errors for people: what was wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_RUNNING = 3  # of `megagpt status` alone: neither well nor ill yet
EXIT_REQUEUE = 75  # stopped and saved: sysexits.h's EX_TEMPFAIL, which schedulers requeue on


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
        return "\n".join(lines)


class UserError(Exception):
    """A mistake of the user's: printed without a traceback, exit code 2.

    Carries one problem or several, so that all mistakes of a file are reported at once.
    """

    exit_code = EXIT_USER

    def __init__(self, what: str, where: str = "", do: str = "", *, others: Sequence[Problem] = ()) -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, where, do), *others)
        super().__init__(what, where, do)

    @classmethod
    def from_problems(cls, problems: Sequence[Problem]) -> UserError:
        """Build one error from one or more problems."""
        first = problems[0]
        return cls(first.what, first.where, first.do, others=problems[1:])

    def __str__(self) -> str:
        return "\n".join(f"megagpt: {problem}" for problem in self.problems)


class MachineError(UserError):
    """A failure of the machine's, such as a full disk: told like a user's mistake, but exit code 1."""

    exit_code = EXIT_FAILURE


def require_linux(what: str) -> None:
    """Raise UserError on another system: what follows would fail in the middle, at a call that only Linux has."""
    if sys.platform != "linux":
        raise UserError(
            f"{what} needs Linux, and this is {sys.platform}", "", "use WSL 2 on Windows, a virtual machine on macOS"
        )


def closest_match(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, or None if none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
