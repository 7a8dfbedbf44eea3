"""Norm of the whole gradient, by which it is clipped: summed in fp64, with one all-reduce for all parameter groups.

DeepSpeed 0.19.8 sums group by group, each with an all-reduce over the pipeline's stages (stage_1_and_2.py,
`scaled_global_norm`). Stages whose layers need different numbers of groups wait for each other forever. Its bf16
optimizer fails on a stage that holds only the copy of a tied matrix, since it stacks an empty list (runtime/utils.py,
`get_global_norm_of_tensors`), and sums in fp32, where a long vector's norm depends on how the vector is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

_CHUNK = 1 << 20
"""Elements that are converted to fp64 at a time"""


def configure(optimizer: Any) -> None:
    """Let an optimizer of DeepSpeed's stages 1 and 2, or its bf16 optimizer, take its gradient norm from here.

    Other optimizers keep theirs: stage 3 never has a pipeline, and sums in fp64 already.
    """
    if isinstance(optimizer, BF16_Optimizer):
        _configure_bf16(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.scaled_global_norm = lambda norm_type=2: _norm_over_ranks(optimizer)


def clip(parameters: Iterable[torch.nn.Parameter], limit: float | None) -> float:
    """Scale the gradients of whole parameters down to a norm of `limit`, if they exceed it.

    Returns the norm before clipping, also where it is NaN or infinite.
    """
    parameters = list(parameters)
    squares = [square_sum(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = math.sqrt(float(torch.stack(squares).sum()))
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, torch.tensor(norm))
    return norm


def square_sum(tensor: Tensor) -> Tensor:
    """Return the sum of the squares of a tensor's elements, as a scalar in fp64 on its device."""
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for chunk in tensor.detach().reshape(-1).split(_CHUNK):
        total += chunk.double().square().sum()
    return total


def _configure_bf16(optimizer: Any) -> None:
    """Hand DeepSpeed this rank's norm in place of its gradients: the norm of one number is that number."""
    gradients = optimizer.get_grads_for_norm

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        found = gradients(for_clipping)
        if for_clipping:
            return found
        total = torch.zeros((), dtype=torch.float64, device=optimizer.bf16_groups_flat[0].device)
        for gradient in found[0]:
            total += square_sum(gradient)
        return [total.sqrt().float()], found[1]

    optimizer.get_grads_for_norm = get_grads_for_norm


def _norm_over_ranks(optimizer: Any) -> Tensor:
    """Return the norm of the gradient on all ranks, multiplied by fp16's loss scale; infinite if it is not finite."""
    device = torch.device("cpu") if optimizer.cpu_offload else optimizer.bit16_groups_flat[0].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for number, parameters in enumerate(optimizer.params_in_partition):
        for square in _squares(optimizer, number, parameters):
            total += square
    total = total.to(optimizer.bit16_groups_flat[0].device)  # process groups of GPUs reduce nothing on the host
    torch.distributed.all_reduce(total, group=optimizer.dp_process_group)
    optimizer._model_parallel_all_reduce(tensor=total, op=torch.distributed.ReduceOp.SUM)
    norm = total.sqrt().float().to(optimizer.device)
    return torch.where(torch.isfinite(norm), norm, torch.full_like(norm, math.inf))


def _squares(optimizer: Any, number: int, parameters: Sequence[Any]) -> Iterator[Tensor]:
    """Square sums of this rank's partition of one parameter group, by parameter.

    A parameter that several stages or tensor-parallel ranks hold alike is counted on one of them.
    """
    if optimizer.cpu_offload:  # the gradients have left the device: DeepSpeed has measured them before, in fp64
        norms = optimizer.norm_for_param_grads
        squares = (norms[optimizer.get_param_id(p)].double().cpu().square() for p in parameters)
    else:
        gradients = optimizer.averaged_gradients[number]
        squares = (square_sum(one) for one in gradients if not getattr(one, "_zero_padding", False))
    for parameter, square in zip(parameters, squares, strict=False):
        replicated = getattr(parameter, "ds_pipe_replicated", False)
        if not replicated and (is_model_parallel_parameter(parameter) or optimizer.model_parallel_rank == 0):
            yield square
