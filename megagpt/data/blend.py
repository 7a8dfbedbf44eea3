"""How much of each source a run uses: shown before training, and compared with each source's `max_epochs`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megagpt.config.recipe import Source
from megagpt.data.sampler import Sampler
from megagpt.errors import Problem, UserError


@dataclass(frozen=True)
class SourceUsage:
    """What a run uses of one source.

    Attributes:
        path: prefix of the corpus.
        tokens: tokens of the corpus.
        fraction: fraction of all samples that come from it.
        samples: number of its samples that the run uses, to within one block of the order.
        epochs: how many times the run reads it.
    """

    path: str
    tokens: int
    fraction: float
    samples: int
    epochs: float


def source_usage(sampler: Sampler, sources: Sequence[Source], samples: int) -> list[SourceUsage]:
    """Return what the first `samples` data positions use of each source.

    Args:
        sampler: data order of the run.
        sources: `data.train` of the recipe.
        samples: samples of the whole run.
    """
    rows = []
    for source, tokens, samples_per_epoch, fraction in zip(
        sources, sampler.tokens, sampler.samples, sampler.fractions, strict=True
    ):
        used = round(samples * fraction)
        rows.append(SourceUsage(source.path, tokens, fraction, used, used / samples_per_epoch))
    return rows


def format_table(rows: Sequence[SourceUsage]) -> list[str]:
    """Return the lines of an aligned table with a header."""
    cells = [("source", "tokens", "fraction", "samples", "epochs")]
    cells += [(r.path, f"{r.tokens:,}", f"{r.fraction:.2%}", f"{r.samples:,}", f"{r.epochs:,.2f}") for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for path, *figures in cells:
        aligned = (f"  {figure:>{width}}" for figure, width in zip(figures, widths[1:], strict=True))
        lines.append(f"{path:<{widths[0]}}" + "".join(aligned))
    return lines


def check_max_epochs(
    rows: Sequence[SourceUsage],
    sources: Sequence[Source],
    samples: int,
    global_batch: int,
    locate: Callable[[str], str],
) -> None:
    """Raise UserError that names every source that the run reads more often than its `max_epochs`.

    Args:
        rows: result of `source_usage`.
        sources: `data.train` of the recipe.
        samples: samples of the whole run.
        global_batch: samples per update.
        locate: returns the `file:line` of a recipe key.
    """
    problems = []
    for index, (row, source) in enumerate(zip(rows, sources, strict=True)):
        if source.max_epochs is None or row.epochs <= source.max_epochs:
            continue
        key = f"data.train.{index}.max_epochs"
        max_updates = math.floor(samples * source.max_epochs / row.epochs / global_batch)
        problems.append(
            Problem(
                f"{row.path} would be read {row.epochs:,.2f} times ({row.samples:,} samples), but its max_epochs is "
                f"{source.max_epochs:g}",
                f"{locate(key)}  {key}".strip(),
                f"train for at most {max_updates:,} updates, give the source a smaller weight, or raise max_epochs",
            )
        )
    if problems:
        raise UserError.from_problems(problems)
