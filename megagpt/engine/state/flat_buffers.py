"""The flat tensors in which DeepSpeed's optimizers keep parameters, and which rank holds what of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from megagpt.engine.optim.muon_all_to_all import Fragment


@dataclass(frozen=True)
class Flat:
    """Parameters one after the other, cut over the ranks of `group`."""

    number: int
    """of the optimizer's parameter group"""
    stretch: Tensor
    """this rank's, in fp32"""
    parameters: Sequence[Any]
    fragments: Callable[[], list[Fragment]]
    """of all ranks; counted from 0 over `parameters`"""
    group: Any


def flats(optimizer: Any) -> Iterator[Flat]:
    """The flat tensors of an optimizer of DeepSpeed's; none of another."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for number, stretch in enumerate(optimizer.fp32_partitioned_groups_flat):
            parameters, ranks = optimizer.fp16_groups[number], optimizer.sub_group_process_groups[number]
            found = partial(_partitioned, parameters)
            yield Flat(optimizer.sub_group_to_group_id[number], stretch, parameters, found, ranks)
    elif isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        for number, group in enumerate(optimizer.param_groups):
            if isinstance(optimizer, BF16_Optimizer):
                parameters = optimizer.bf16_groups[number]
                starts = list(accumulate((parameter.numel() for parameter in parameters[:-1]), initial=0))
            else:
                parameters = optimizer.round_robin_bit16_groups[number]
                starts = optimizer.round_robin_bit16_offsets[number]
            (stretch,) = group["params"]
            found = partial(_stretched, parameters, starts, stretch.numel())
            yield Flat(number, stretch, parameters, found, optimizer.real_dp_process_group[number])


def _stretched(parameters: Sequence[Any], starts: Sequence[int], length: int) -> list[Fragment]:
    """Stages 1 and 2: stretches of equal length, whose borders lie anywhere in a parameter."""
    found = []
    for index, (start, parameter) in enumerate(zip(starts, parameters, strict=True)):
        end = start + parameter.numel()
        for rank in range(start // length, (end - 1) // length + 1):
            first, last = max(start, rank * length), min(end, (rank + 1) * length)
            found.append(Fragment(index, rank, first - start, last - first, first - rank * length))
    return found


def _partitioned(parameters: Sequence[Any]) -> list[Fragment]:
    """Stage 3: an even part of every parameter on each rank; the last ones are filled up."""
    place, found = 0, []
    for index, parameter in enumerate(parameters):
        length = parameter.ds_tensor.ds_numel
        for rank in range(-(-parameter.ds_numel // length)):
            size = min(length, parameter.ds_numel - rank * length)
            found.append(Fragment(index, rank, rank * length, size, place))
        place += length
    return found
