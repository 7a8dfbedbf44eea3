"""Reader of DeepSpeed's hostfile that reports errors with line numbers."""

from __future__ import annotations

import re
from pathlib import Path

from megagpt.errors import Problem, UserError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_FORMAT = "write `HOST slots=NUMBER`, one host per line; `#` starts a comment line"


def read(path: Path) -> dict[str, int]:
    """Return the number of ranks per host, in the order of the file.

    The parser is stricter than DeepSpeed's, which ignores any text after the number. Raises UserError with all
    mistakes and their lines.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"the hostfile cannot be read: {error.strerror}", str(path), "pass its path") from None
    slots: dict[str, int] = {}
    first_line: dict[str, int] = {}
    problems: list[Problem] = []
    for number, line in enumerate(map(str.strip, lines), 1):
        where = f"{path}:{number}: {line}"
        found = _LINE.fullmatch(line)
        if not line or line.startswith("#"):
            continue
        if not found:
            problems.append(Problem("not a line of a hostfile", where, _FORMAT))
        elif found[1] in slots:
            what = f"{found[1]} is listed twice, first in line {first_line[found[1]]}"
            problems.append(Problem(what, where, "give each host one line, with all its slots"))
        elif not int(found[2]):
            problems.append(Problem(f"{found[1]} has no slots", where, "remove the host, or give it slots"))
        else:
            slots[found[1]], first_line[found[1]] = int(found[2]), number
    if problems:
        raise UserError.from_problems(problems)
    if not slots:
        raise UserError("the hostfile has no hosts", str(path), _FORMAT)
    return slots
