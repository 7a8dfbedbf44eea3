"""What a check has found, and all findings together: for people as a table, for programs as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megagpt.errors import EXIT_DONE, EXIT_FAILURE

if TYPE_CHECKING:
    from rich.table import Table

GOOD, ODD, BAD, UNASKED = "good", "odd", "bad", "unasked"
_MARKS = {GOOD: "✓", ODD: "!", BAD: "✗", UNASKED: "–"}
_STYLES = {GOOD: "green", ODD: "yellow", BAD: "bold red", UNASKED: "dim"}


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do.

    `mark` is good, odd, bad or unasked; `hosts` are those that it was found on, none if it is of no host in particular.
    """

    check: str
    mark: str
    what: str
    do: str = ""
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All findings, in the order of the checks. `ok` is whether none is bad."""

    ok: bool
    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, findings: Sequence[Finding]) -> Report:
        """One finding for all hosts that share it."""
        joined: dict[tuple[str, str, str, str], list[str]] = {}
        for found in findings:
            hosts = joined.setdefault((found.check, found.mark, found.what, found.do), [])
            hosts += [host for host in found.hosts if host not in hosts]
        rows = tuple(Finding(*key, tuple(hosts)) for key, hosts in joined.items())
        return cls(all(row.mark != BAD for row in rows), rows)

    @property
    def code(self) -> int:
        """The exit code."""
        return EXIT_DONE if self.ok else EXIT_FAILURE

    @property
    def summary(self) -> str:
        """The last line: how many checks there were of each kind."""
        counts = {mark: sum(row.mark == mark for row in self.findings) for mark in _STYLES}
        names = {BAD: "wrong", ODD: "to look at", GOOD: "good", UNASKED: "not asked"}
        return ", ".join(f"{counts[mark]} {name}" for mark, name in names.items() if counts[mark])

    def __str__(self) -> str:
        """The table, in colours on a terminal."""
        from rich.console import Console

        console = Console()
        with console.capture() as capture:
            console.print(self.table())
            console.print(f"\n{self.summary}", highlight=False)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def table(self) -> Table:
        """A row for each finding; what is to be done stands under what is wrong."""
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        last = ""
        for row in self.findings:
            style = _STYLES[row.mark]
            said = Text.assemble((f"{', '.join(row.hosts)}: " if row.hosts else "", "bold"), row.what)
            if row.mark == UNASKED:
                said.stylize("dim")
            check = row.check if row.check != last else ""
            table.add_row(Text(_MARKS[row.mark], style), Text(check, style if row.mark == BAD else ""), said)
            if row.do:
                table.add_row("", "", Padding(Text.assemble(("do: ", "cyan"), row.do), (0, 0, 0, 2)))
            last = row.check
        return table
