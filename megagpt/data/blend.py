"""Computes how much of each source a run uses.

The result is shown before training, and compared with the `max_epochs` of each source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megagpt.config.recipe import Source
from megagpt.data.sampler import Sampler
from megagpt.errors import Problem, UserError


@dataclass(frozen=True)
class SourceUsage:
    """Amount of one source that a run uses.

    Attributes:
        path: prefix of the corpus.
        tokens: number of tokens in the corpus.
        fraction: fraction of all samples that come from this source.
        samples: number of samples that the run takes from this source, accurate to one block of the data order.
        epochs: number of times that the run reads the source.
    """

    path: str
    tokens: int
    fraction: float
    samples: int
    epochs: float


def source_usage(sampler: Sampler, sources: Sequence[Source], samples: int) -> list[SourceUsage]:
    """Return the amount of each source that the first `samples` data positions use.

    Args:
        sampler: sampler that defines the data order of the run.
        sources: sources in `data.train` of the recipe.
        samples: number of samples in the whole run.
    """
    rows = []
    for source, tokens, samples_per_epoch, fraction in zip(
        sources, sampler.tokens, sampler.samples, sampler.fractions, strict=True
    ):
        used = round(samples * fraction)
        rows.append(SourceUsage(source.path, tokens, fraction, used, used / samples_per_epoch))
    return rows


def format_table(rows: Sequence[SourceUsage]) -> list[str]:
    """Format the usage of all sources as the lines of an aligned table with a header."""
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
    """Raise UserError if the run reads some sources more often than their `max_epochs`. The error names all of them.

    Args:
        rows: result of `source_usage`.
        sources: sources in `data.train` of the recipe.
        samples: number of samples in the whole run.
        global_batch: samples per update.
        locate: function that returns the location of a recipe key as `file:line`.
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
