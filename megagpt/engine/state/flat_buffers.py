"""Access to the flat buffers of DeepSpeed's optimizers, and to the fragments of parameters that each rank holds.

This module reads private attributes of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py,
runtime/bf16_optimizer.py). tests/parity compares the resulting updates and checkpoints with a plain PyTorch loop.
"""

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
class FlatBuffer:
    """Buffer of flattened parameters, one after the other, that is partitioned over the ranks of `group`."""

    param_group: int
    """index of the optimizer's parameter group"""
    partition: Tensor
    """this rank's range of the buffer, in fp32"""
    parameters: Sequence[Any]
    fragments: Callable[[], list[Fragment]]
    """function that returns the fragments on all ranks, in which `matrix` is the index in `parameters`"""
    group: Any


def flat_buffers(optimizer: Any) -> Iterator[FlatBuffer]:
    """Yield the flat buffers of a DeepSpeed optimizer. Without ZeRO, there are none."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for number, partition in enumerate(optimizer.fp32_partitioned_groups_flat):
            parameters = optimizer.fp16_groups[number]
            fragments = partial(fragments_of_parameters, parameters)
            param_group = optimizer.sub_group_to_group_id[number]
            yield FlatBuffer(param_group, partition, parameters, fragments, optimizer.sub_group_process_groups[number])
    elif isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        for number, group in enumerate(optimizer.param_groups):
            if isinstance(optimizer, BF16_Optimizer):
                parameters = optimizer.bf16_groups[number]
                starts = list(accumulate((parameter.numel() for parameter in parameters[:-1]), initial=0))
            else:
                parameters = optimizer.round_robin_bit16_groups[number]
                starts = optimizer.round_robin_bit16_offsets[number]
            (partition,) = group["params"]
            fragments = partial(fragments_of_buffer, parameters, starts, partition.numel())
            yield FlatBuffer(number, partition, parameters, fragments, optimizer.real_dp_process_group[number])


def fragments_of_buffer(parameters: Sequence[Any], starts: Sequence[int], length: int) -> list[Fragment]:
    """Return the fragments at ZeRO stages 1 and 2, where the ranks hold equal ranges of the buffer.

    Args:
        parameters: The parameters in the buffer.
        starts: Index in the buffer of the first element of each parameter.
        length: Number of elements in the range of each rank.
    """
    fragments = []
    for index, (start, parameter) in enumerate(zip(starts, parameters, strict=True)):
        end = start + parameter.numel()
        for rank in range(start // length, (end - 1) // length + 1):
            first = max(start, rank * length)
            last = min(end, (rank + 1) * length)
            fragments.append(Fragment(index, rank, first - start, last - first, first - rank * length))
    return fragments


def fragments_of_parameters(parameters: Sequence[Any]) -> list[Fragment]:
    """Return the fragments at ZeRO stage 3, where each parameter is padded and split evenly over the ranks."""
    offset = 0
    fragments = []
    for index, parameter in enumerate(parameters):
        length = parameter.ds_tensor.ds_numel
        for rank in range(-(-parameter.ds_numel // length)):
            numel = min(length, parameter.ds_numel - rank * length)
            fragments.append(Fragment(index, rank, rank * length, numel, offset))
        offset += length
    return fragments
