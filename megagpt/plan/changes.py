"""Find small changes that make a layout fit, in the form of overrides to add to the command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import TYPE_CHECKING

from megagpt.config.deepspeed.activation_checkpointing import RECOMPUTED_BLOCKS_KEY
from megagpt.config.deepspeed.batch import MICRO_BATCH_KEY, divisors
from megagpt.config.deepspeed.parallelism import TENSOR_PARALLEL_KEY
from megagpt.config.deepspeed.unsupported import ZERO_STAGE_KEY
from megagpt.errors import UserError
from megagpt.plan.rank_state import ZeroSettings

if TYPE_CHECKING:
    from megagpt.config.deepspeed import Resolved

_MAX_SUGGESTIONS = 3
_MAX_TENSOR_PARALLEL = 8  # Fast links rarely connect more GPUs than this.
_Overrides = tuple[str, ...]
_Cost = int


def nearest(
    resolved: Resolved, resolve: Callable[[_Overrides], Resolved], fits: Callable[[Resolved], bool]
) -> tuple[str, ...]:
    """Find up to three sets of overrides that make a run fit.

    Args:
        resolved: the resolved config of the run that does not fit.
        resolve: function that resolves the config with additional overrides.
        fits: function that returns True if a resolved run fits.

    Returns:
        The sets of overrides, each joined by spaces. Small and cheap sets come first. A set that changes all keys of an
        earlier set is omitted.
    """
    found: list[_Overrides] = []
    for overrides in _candidates(resolved):
        if any(_keys(earlier) <= _keys(overrides) for earlier in found):
            continue
        try:
            if fits(resolve(overrides)):
                found.append(overrides)
        except UserError:  # This layout is not possible.
            continue
        if len(found) == _MAX_SUGGESTIONS:
            break
    return tuple(" ".join(overrides) for overrides in found)


def _candidates(resolved: Resolved) -> Iterator[_Overrides]:
    """Yield all combinations of overrides, ordered by the number of overrides and then by their cost in speed."""
    groups = [
        [(0, ()), *options]
        for options in (
            _smaller_micro_batches(resolved),
            _higher_zero_stages(resolved),
            _recomputation(resolved),
            _more_tensor_parallelism(resolved),
            _offload(resolved),
        )
    ]
    combined = (
        (sum(cost for cost, _ in options), tuple(override for _, overrides in options for override in overrides))
        for options in product(*groups)
    )
    ordered = sorted(combined, key=lambda candidate: (len(candidate[1]), candidate[0]))
    yield from (overrides for _, overrides in ordered if overrides)


def _smaller_micro_batches(resolved: Resolved) -> list[tuple[_Cost, _Overrides]]:
    layout = resolved.layout
    sizes = reversed(divisors(layout.micro_batch * layout.accumulation))
    smaller = [size for size in sizes if size < layout.micro_batch]
    return [(1 + number, (f"ds.{MICRO_BATCH_KEY}={size}",)) for number, size in enumerate(smaller)]


def _higher_zero_stages(resolved: Resolved) -> list[tuple[_Cost, _Overrides]]:
    layout = resolved.layout
    if layout.pipeline_stages > 1 or ZeroSettings(resolved).shards == 1:
        return []
    return [(3 * stage, (f"ds.{ZERO_STAGE_KEY}={stage}",)) for stage in range(layout.zero_stage + 1, 4)]


def _recomputation(resolved: Resolved) -> list[tuple[_Cost, _Overrides]]:
    if resolved.layout.recomputed_blocks == resolved.recipe.model.n_layer:
        return []
    return [(6, (f"ds.{RECOMPUTED_BLOCKS_KEY}=auto",))]


def _more_tensor_parallelism(resolved: Resolved) -> list[tuple[_Cost, _Overrides]]:
    layout = resolved.layout
    degrees = range(2 * layout.tensor_parallel, _MAX_TENSOR_PARALLEL + 1)
    return [
        (4 + degree, (f"ds.{TENSOR_PARALLEL_KEY}={degree}",)) for degree in degrees if layout.world_size % degree == 0
    ]


def _offload(resolved: Resolved) -> list[tuple[_Cost, _Overrides]]:
    """Return the overrides that offload the optimizer, the parameters, or both."""
    zero = ZeroSettings(resolved)
    options: list[tuple[_Cost, _Overrides]] = [
        (20 * number, (f"ds.zero_optimization.offload_{what}.device=cpu",))
        for number, what in enumerate(("optimizer", "param"), start=1)
        if zero.device(what) == "none"
    ]
    both = tuple(override for _, overrides in options for override in overrides)
    return [*options, (60, both)]


def _keys(overrides: _Overrides) -> set[str]:
    return {override.partition("=")[0] for override in overrides}
