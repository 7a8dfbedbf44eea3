"""SLURM's short forms of hosts and counts, without asking scontrol, which a container may not have."""

from __future__ import annotations

import itertools
import re


def hosts(text: str) -> list[str]:
    """The hosts of a SLURM list such as `node[01-03,7],login`, in its order.

    Form: slurm.schedmd.com/sbatch.html, SLURM_JOB_NODELIST; zeros in front are kept, several brackets multiply.
    """
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        pieces = re.split(r"\[([^\]]*)\]", part)  # every second piece stood in brackets
        choices = [_numbers(piece) if odd % 2 else [piece] for odd, piece in enumerate(pieces)]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return names


def counts(text: str) -> list[int]:
    """The count of each host of a SLURM list such as `2(x3),1`: 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _numbers(text: str) -> list[str]:
    """`01-03,7` in full: 01, 02, 03, 7."""
    numbers: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return numbers
