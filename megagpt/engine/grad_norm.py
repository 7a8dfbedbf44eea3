"""Compute the norm of the whole gradient in fp64, and clip the gradient by it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20
"""number of elements that are converted to fp64 at a time"""


def clip(parameters: Iterable[torch.nn.Parameter], limit: float | None) -> float:
    """Scale the gradients so that the norm of all of them together is at most `limit`.

    Args:
        parameters: Whole parameters, not partitions. Parameters without a gradient are skipped.
        limit: The largest norm allowed, or None to leave the gradients as they are.

    Returns:
        The norm before clipping, which may be NaN or infinite.
    """
    parameters = list(parameters)
    squares = [square_sum(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = math.sqrt(float(torch.stack(squares).sum()))
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, torch.tensor(norm))
    return norm


def square_sum(tensor: Tensor) -> Tensor:
    """Return the sum of the squares of a tensor's elements, as an fp64 scalar on its device."""
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for chunk in tensor.detach().reshape(-1).split(_CHUNK_ELEMENTS):
        total += chunk.double().square().sum()
    return total
