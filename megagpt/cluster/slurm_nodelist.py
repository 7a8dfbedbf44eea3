"""Expansion of SLURM's compact lists of hosts and counts, without scontrol, which a container may not have."""

from __future__ import annotations

import itertools
import re


def expand_hosts(text: str) -> list[str]:
    """Return the hosts of a SLURM list such as `node[01-03,7],login`, in order.

    The format is that of SLURM_JOB_NODELIST (slurm.schedmd.com/sbatch.html). Leading zeros are kept, and a name may
    have several pairs of brackets.
    """
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        alternating = re.split(r"\[([^\]]*)\]", part)  # parts outside and inside of brackets, in turn
        choices = [_expand_numbers(one) if index % 2 else [one] for index, one in enumerate(alternating)]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return names


def expand_counts(text: str) -> list[int]:
    """Return the count per host of a SLURM list. For example, `2(x3),1` stands for 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _expand_numbers(text: str) -> list[str]:
    """Return the numbers of a list of ranges. For example, `01-03,7` stands for 01, 02, 03, 7."""
    numbers: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return numbers
