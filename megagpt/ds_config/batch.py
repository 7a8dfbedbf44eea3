"""The global batch cut into micro-batches of samples."""

from __future__ import annotations

from dataclasses import dataclass

from megagpt.ds_config.parallel import NOT_PARALLEL, ParallelDegrees
from megagpt.ds_config.view import ConfigView
from megagpt.errors import Problem
from megagpt.recipe import Recipe
from megagpt.recipe.wording import TableRow, format_table, join_words

MICRO_BATCH_KEY, ACCUMULATION_KEY = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
_TOKENS_AT_ONCE = 16_384  # of an automatic micro-batch: enough to fill a GPU, little enough to fit
_PER_STAGE = 4  # micro-batches


@dataclass(frozen=True)
class BatchSplit:
    """Samples per micro-batch, and micro-batches per update and rank."""

    micro: int
    accumulation: int


def split_batch(
    view: ConfigView, recipe: Recipe, ranks: int, cut: ParallelDegrees = NOT_PARALLEL
) -> BatchSplit | Problem:
    """Cut the global batch over the data-parallel ranks; a problem if it does not divide.

    An automatic micro-batch is small enough to keep the stages of a pipeline busy.
    """
    total, micro, accumulation = (
        recipe.batch.global_size,
        view.explicit(MICRO_BATCH_KEY, 0),
        view.explicit(ACCUMULATION_KEY, 0),
    )
    rows: list[TableRow] = [
        ("batch.global_size", total, recipe.location("batch.global_size")),
        ("data-parallel ranks", ranks, "from the world size"),
    ]
    if total % ranks:
        fewer = join_words(str(count * cut.ranks) for count in divisors(total) if count <= 2 * ranks)
        do = f"set batch.global_size to {_multiples(total, ranks)}, or start {fewer} ranks"
        return Problem("the global batch does not divide by the ranks", format_table(rows), do)
    share = total // ranks
    rows += [view.row(key) for key in (MICRO_BATCH_KEY, ACCUMULATION_KEY) if view.explicit(key, 0)]
    if micro and accumulation and micro * accumulation != share:
        do = f'write "auto" for {ACCUMULATION_KEY}: it is derived'
        return Problem("the batch sizes do not multiply up to the global batch", format_table(rows), do)
    for key, given in ((MICRO_BATCH_KEY, micro), (ACCUMULATION_KEY, accumulation)):
        if given and share % given:
            what = f"{key} does not divide the {share} samples of a rank"
            do = f"set it to {_neighbours(share, given)}, or batch.global_size to {_multiples(total, ranks * given)}"
            return Problem(what, format_table(rows), do)
    micro = micro or (share // accumulation if accumulation else _largest(share, recipe.model.seq_len, cut.stages))
    return BatchSplit(micro, share // micro)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [count for count in range(1, number + 1) if number % count == 0]


def _largest(share: int, seq_len: int, stages: int) -> int:
    """The largest divisor whose micro-batch stays within the tokens at once, and at least 1.

    A pipeline of p stages idles (p - 1) / (m + p - 1) of the time with m micro-batches: under a fifth for 4·p.
    """
    most = max(share // (_PER_STAGE * stages), 1) if stages > 1 else share
    fitting = (count for count in divisors(share) if count <= most and count * seq_len <= _TOKENS_AT_ONCE)
    return max(fitting, default=1)


def _multiples(value: int, step: int) -> str:
    """The multiples of `step` just below and above a value that is none."""
    below = value // step * step
    return join_words(str(near) for near in (below, below + step) if near)


def _neighbours(share: int, given: int) -> str:
    """The divisors of `share` just below and above a value that is none."""
    below = max((count for count in divisors(share) if count < given), default=0)
    above = min((count for count in divisors(share) if count > given), default=0)
    return join_words(str(near) for near in (below, above) if near)
