"""DeepSpeed's hostfile, read as strictly as it will be read once the job starts, with line numbers."""

from __future__ import annotations

import re
from pathlib import Path

from megagpt.errors import Problem, UserError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_FORM = "write `HOST slots=NUMBER`, one host a line; `#` begins a comment line"


def read(path: Path) -> dict[str, int]:
    """The number of ranks of each host, in the file's order.

    Raises UserError with every mistake and its line. Stricter than DeepSpeed, which drops what follows the number.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"the hostfile cannot be read: {error.strerror}", str(path), "give its path") from None
    slots: dict[str, int] = {}
    first: dict[str, int] = {}
    problems: list[Problem] = []
    for number, line in enumerate(map(str.strip, lines), 1):
        where = f"{path}:{number}: {line}"
        found = _LINE.fullmatch(line)
        if not line or line.startswith("#"):
            continue
        if not found:
            problems.append(Problem("this line is no host", where, _FORM))
        elif found[1] in slots:
            problems.append(Problem(f"{found[1]} stands here twice, first in line {first[found[1]]}", where,
                                    "give each host one line, with all its slots"))  # fmt: skip
        elif not int(found[2]):
            problems.append(Problem(f"{found[1]} has no slots", where, "leave the host out, or give it slots"))
        else:
            slots[found[1]], first[found[1]] = int(found[2]), number
    if problems:
        raise UserError.from_problems(problems)
    if not slots:
        raise UserError("the hostfile names no host", str(path), _FORM)
    return slots
