"""Findings of the checks, and the report of all findings as a table or as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megagpt.errors import EXIT_DONE, EXIT_FAILURE

if TYPE_CHECKING:
    from rich.table import Table

OK, WARNING, ERROR, SKIPPED = "ok", "warning", "error", "skipped"
_SYMBOLS = {ERROR: ("✗", "bold red"), WARNING: ("!", "yellow"), OK: ("✓", "green"), SKIPPED: ("–", "dim")}
_COUNT_LABELS = {ERROR: "failed", WARNING: "with a warning", OK: "passed", SKIPPED: "skipped"}


@dataclass(frozen=True)
class Finding:
    """Result of a check on the given hosts, or on all hosts if none are given.

    `status` is "ok", "warning" (training can start, but the finding should be examined), "error" (training would fail
    or give wrong results) or "skipped".
    """

    check: str
    status: str
    what: str
    do: str = ""
    hosts: tuple[str, ...] = ()


class CheckResult:
    """Collects the findings of one check."""

    def __init__(self, check: str) -> None:
        self.check = check
        self.findings: list[Finding] = []

    def error(self, what: str, do: str, *hosts: str) -> None:
        """Record a problem that would make training fail or give wrong results."""
        self.findings.append(Finding(self.check, ERROR, what, do, hosts))

    def warn(self, what: str, do: str, *hosts: str) -> None:
        """Record a problem that does not stop training but should be examined."""
        self.findings.append(Finding(self.check, WARNING, what, do, hosts))

    def passed(self, what: str) -> None:
        """Record that all hosts passed, unless this check has already found a problem."""
        if not self.findings:
            self.findings.append(Finding(self.check, OK, what))

    def skip(self, why: str) -> None:
        """Record that nothing was checked, and the reason."""
        self.findings.append(Finding(self.check, SKIPPED, why))


@dataclass(frozen=True)
class Report:
    """All findings, in the order of the checks. `ok` is True if no finding is an error."""

    ok: bool
    findings: tuple[Finding, ...]

    @classmethod
    def from_findings(cls, findings: Sequence[Finding]) -> Report:
        """Return the report of these findings. Equal findings on several hosts are merged into one."""
        merged: dict[tuple[str, str, str, str], list[str]] = {}
        for finding in findings:
            hosts = merged.setdefault((finding.check, finding.status, finding.what, finding.do), [])
            hosts += [host for host in finding.hosts if host not in hosts]
        rows = tuple(Finding(*key, tuple(hosts)) for key, hosts in merged.items())
        return cls(all(row.status != ERROR for row in rows), rows)

    @property
    def code(self) -> int:
        """Exit code of the command."""
        return EXIT_DONE if self.ok else EXIT_FAILURE

    @property
    def summary(self) -> str:
        """Text with the number of findings by status, which is the last line of the report."""
        statuses = [row.status for row in self.findings]
        return ", ".join(f"{statuses.count(one)} {label}" for one, label in _COUNT_LABELS.items() if one in statuses)

    def __str__(self) -> str:
        """Return the table and the summary as text, with colors if standard output is a terminal."""
        from rich.console import Console

        console = Console()
        with console.capture() as capture:
            console.print(self.table())
            console.print(f"\n{self.summary}", highlight=False)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def table(self) -> Table:
        """Return a table with one row per finding, each followed by advice on what to do about it."""
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        previous = ""
        for row in self.findings:
            symbol, style = _SYMBOLS[row.status]
            hosts = f"{', '.join(row.hosts)}: " if row.hosts else ""
            text = Text.assemble((hosts, "bold"), row.what, style="dim" if row.status == SKIPPED else "")
            check = row.check if row.check != previous else ""
            table.add_row(Text(symbol, style), Text(check, style if row.status == ERROR else ""), text)
            if row.do:
                table.add_row("", "", Padding(Text.assemble(("do: ", "cyan"), row.do), (0, 0, 0, 2)))
            previous = row.check
        return table


def format_bytes(count: float) -> str:
    """Return a number of bytes with a decimal unit, such as "8.0 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
