"""What a run takes from each source of a blend: said before training, and held against the sources' limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megagpt.data.order import Order
from megagpt.errors import Problem, UserError
from megagpt.recipe import Source


@dataclass(frozen=True)
class Taken:
    """What a run takes from one source: its share of all samples, how many that are, and how often it is read."""

    path: str
    tokens: int
    share: float
    samples: int
    epochs: float


def taken(order: Order, sources: Sequence[Source], samples: int) -> list[Taken]:
    """What the first `samples` data positions take from each source, to within one block of the order."""
    found = []
    for source, tokens, whole, share in zip(sources, order.tokens, order.samples, order.shares, strict=True):
        part = round(samples * share)
        found.append(Taken(source.path, tokens, share, part, part / whole))
    return found


def table(rows: Sequence[Taken]) -> list[str]:
    """Aligned lines for people, with a head."""
    cells = [("source", "tokens", "share", "samples", "epochs")]
    cells += [(r.path, f"{r.tokens:,}", f"{r.share:.2%}", f"{r.samples:,}", f"{r.epochs:,.2f}") for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        f"{name:<{widths[0]}}" + "".join(f"  {n:>{w}}" for n, w in zip(ns, widths[1:], strict=True))
        for name, *ns in cells
    ]


def check_limits(
    rows: Sequence[Taken], sources: Sequence[Source], samples: int, global_batch: int, place: Callable[[str], str]
) -> None:
    """Raise UserError for every source that is read more often than its max_epochs; `place` finds a key's line."""
    problems = []
    for number, (row, source) in enumerate(zip(rows, sources, strict=True)):
        if source.max_epochs is None or row.epochs <= source.max_epochs:
            continue
        key = f"data.train.{number}.max_epochs"
        longest = math.floor(samples * source.max_epochs / row.epochs / global_batch)
        problems.append(
            Problem(
                f"{row.path} would be read {row.epochs:,.2f} times ({row.samples:,} samples), and its max_epochs is "
                f"{source.max_epochs:g}",
                f"{place(key)}  {key}".strip(),
                f"train for at most {longest:,} updates, give it a smaller weight, or raise max_epochs",
            )
        )
    if problems:
        raise UserError.from_problems(problems)
