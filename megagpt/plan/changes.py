"""The nearest changes of a layout that make it fit, as words to add to the command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import TYPE_CHECKING

from megagpt.config.deepspeed.activation_checkpointing import RECOMPUTED_BLOCKS_KEY
from megagpt.config.deepspeed.batch import MICRO_BATCH_KEY, divisors
from megagpt.config.deepspeed.parallelism import TENSOR_PARALLEL_KEY
from megagpt.config.deepspeed.unsupported import ZERO_STAGE_KEY
from megagpt.errors import UserError
from megagpt.plan.states import Zero

if TYPE_CHECKING:
    from megagpt.config.deepspeed import Resolved

_MOST = 3
_Words = tuple[str, ...]
_MOST_TENSOR = 8  # parts: more than a machine's GPUs are not joined by a fast link


def nearest(
    resolved: Resolved, resolve: Callable[[_Words], Resolved], fits: Callable[[Resolved], bool]
) -> tuple[str, ...]:
    """Up to three sets of words, the fewest and cheapest first; none changes all keys that another does."""
    found: list[_Words] = []
    for words in _candidates(resolved):
        if any(_keys(one) <= _keys(words) for one in found):
            continue
        try:
            if fits(resolve(words)):
                found.append(words)
        except UserError:  # this layout cannot be
            continue
        if len(found) == _MOST:
            break
    return tuple(" ".join(words) for words in found)


def _candidates(resolved: Resolved) -> Iterator[_Words]:
    """All combinations; of equally many, by what they cost: micro-batch, traffic, arithmetic, the bus to the host."""
    layout, zero = resolved.layout, Zero(resolved)
    share = layout.micro_batch * layout.accumulation
    smaller = [size for size in reversed(divisors(share)) if size < layout.micro_batch]
    micro = [(1 + number, f"ds.{MICRO_BATCH_KEY}={size}") for number, size in enumerate(smaller)]
    one_way = layout.pipeline_stages == 1 and zero.shards > 1
    stages = [(3 * number, f"ds.{ZERO_STAGE_KEY}={number}") for number in range(layout.zero_stage + 1, 4) if one_way]
    whole = layout.recomputed_blocks < resolved.recipe.model.n_layer
    again = [(6, f"ds.{RECOMPUTED_BLOCKS_KEY}=auto")] if whole else []
    cuts = range(2 * layout.tensor_parallel, _MOST_TENSOR + 1)
    tensor = [(4 + parts, f"ds.{TENSOR_PARALLEL_KEY}={parts}") for parts in cuts if layout.world_size % parts == 0]
    away = [
        (20 * number, f"ds.zero_optimization.offload_{what}.device=cpu")
        for number, what in enumerate(("optimizer", "param"), start=1)
        if zero.device(what) == "none"
    ]
    offload = [*((cost, (word,)) for cost, word in away), (60, tuple(word for _, word in away))]
    single = [[(0, ()), *((cost, (word,)) for cost, word in kind)] for kind in (micro, stages, again, tensor)]
    combined = (
        (sum(cost for cost, _ in parts), tuple(word for _, words in parts for word in words))
        for parts in product(*single, [(0, ()), *offload])
    )
    ordered = sorted(combined, key=lambda one: (len(one[1]), one[0]))
    yield from (words for _, words in ordered if words)


def _keys(words: _Words) -> set[str]:
    return {word.partition("=")[0] for word in words}
