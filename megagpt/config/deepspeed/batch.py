"""Split the global batch into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from megagpt.config.deepspeed.parallelism import NOT_PARALLEL, ParallelDegrees
from megagpt.config.deepspeed.view import ConfigView
from megagpt.config.recipe import Recipe
from megagpt.config.syntax.formatting import TableRow, format_table, join_words
from megagpt.errors import Problem

MICRO_BATCH_KEY = "train_micro_batch_size_per_gpu"
ACCUMULATION_KEY = "gradient_accumulation_steps"
# An automatic micro-batch has at most this many tokens: enough to keep a GPU busy, but few enough to fit into memory.
_MAX_MICRO_BATCH_TOKENS = 16_384
# An automatic micro-batch is small enough to give a pipeline this many micro-batches per stage (_largest_micro_batch).
_MICRO_BATCHES_PER_STAGE = 4


@dataclass(frozen=True)
class BatchSplit:
    """Split of a data-parallel replica's samples of one update into micro-batches."""

    micro: int
    """number of samples per micro-batch"""
    accumulation: int
    """number of micro-batches per update"""


def split_batch(
    view: ConfigView, recipe: Recipe, replicas: int, degrees: ParallelDegrees = NOT_PARALLEL
) -> BatchSplit | Problem:
    """Split the global batch over the data-parallel replicas.

    Args:
        view: the DeepSpeed config, which may fix the micro-batch, the accumulation, or both.
        recipe: the recipe, which defines the size of the global batch.
        replicas: number of data-parallel replicas.
        degrees: parallelism degrees. An automatic micro-batch is small enough to keep all pipeline stages busy.

    Returns:
        The split, or a problem if the global batch cannot be divided evenly.
    """
    total = recipe.batch.global_size
    micro, accumulation = view.explicit(MICRO_BATCH_KEY, 0), view.explicit(ACCUMULATION_KEY, 0)
    rows: list[TableRow] = [
        ("batch.global_size", total, recipe.location("batch.global_size")),
        ("data-parallel ranks", replicas, "from the world size"),
    ]
    if total % replicas:
        possible = join_words(str(count * degrees.ranks) for count in divisors(total) if count <= 2 * replicas)
        do = f"set batch.global_size to {_multiples(total, replicas)}, or start {possible} ranks"
        return Problem("the global batch is not divisible by the number of data-parallel ranks", format_table(rows), do)
    per_replica = total // replicas
    rows += [view.row(key) for key in (MICRO_BATCH_KEY, ACCUMULATION_KEY) if view.explicit(key, 0)]
    if micro and accumulation and micro * accumulation != per_replica:
        do = f'write "auto" for {ACCUMULATION_KEY}: it is derived'
        return Problem("the product of the batch sizes is not the global batch", format_table(rows), do)
    for key, given in ((MICRO_BATCH_KEY, micro), (ACCUMULATION_KEY, accumulation)):
        if given and per_replica % given:
            what = f"{key} does not divide the {per_replica} samples of each data-parallel rank"
            multiples = _multiples(total, replicas * given)
            do = f"set it to {_nearest_divisors(per_replica, given)}, or batch.global_size to {multiples}"
            return Problem(what, format_table(rows), do)
    if not micro and accumulation:
        micro = per_replica // accumulation
    elif not micro:
        micro = _largest_micro_batch(per_replica, recipe.model.seq_len, degrees.stages)
    return BatchSplit(micro, per_replica // micro)


def divisors(number: int) -> list[int]:
    """Return all divisors in ascending order."""
    return [count for count in range(1, number + 1) if number % count == 0]


def _largest_micro_batch(samples: int, seq_len: int, stages: int) -> int:
    """Return the largest divisor of `samples` that stays within the token limit, or 1 if there is none.

    With m micro-batches, each of the p stages of a pipeline is idle for a fraction (p - 1) / (m + p - 1) of the time.
    For m = 4·p this is less than a fifth.
    """
    limit = max(samples // (_MICRO_BATCHES_PER_STAGE * stages), 1) if stages > 1 else samples
    fitting = (size for size in divisors(samples) if size <= limit and size * seq_len <= _MAX_MICRO_BATCH_TOKENS)
    return max(fitting, default=1)


def _multiples(value: int, step: int) -> str:
    """Return the multiples of `step` just below and above `value`, which is not a multiple itself."""
    below = value // step * step
    return join_words(str(multiple) for multiple in (below, below + step) if multiple)


def _nearest_divisors(number: int, given: int) -> str:
    """Return the divisors of `number` just below and above `given`, which is not a divisor itself."""
    below = max((divisor for divisor in divisors(number) if divisor < given), default=0)
    above = min((divisor for divisor in divisors(number) if divisor > given), default=0)
    return join_words(str(divisor) for divisor in (below, above) if divisor)
