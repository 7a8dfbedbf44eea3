"""Differences in memory and traffic between Muon and AdamW.

Muon has one moment less per matrix, and reassembles whole matrices for the optimizer step. The formulas follow the
tensors in engine/optim/muon.py and engine/optim/muon_all_to_all.py. tests/unit/plan/test_muon_memory.py compares them
with the memory that torch allocates.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from megagpt.model.flops import MATRICES_AT_ONCE
from megagpt.model.shapes import FP32_BYTES, Shapes
from megagpt.model.sharding import shard_spec
from megagpt.plan.rank_state import LocalParameters, StateBytes, ZeroSettings

if TYPE_CHECKING:
    from megagpt.config.recipe import ModelSection


def matrices(shapes: Shapes) -> Shapes:
    """Return the shapes of the parameters that Muon updates, which are the matrices of the transformer blocks."""
    return {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.count(".") > 2}


def elements(shapes: Shapes) -> int:
    """Return the total number of elements of the matrices that Muon updates."""
    return sum(map(math.prod, matrices(shapes).values()))


def adjust(state: StateBytes, zero: ZeroSettings, local: LocalParameters) -> StateBytes:
    """Return the training state of a rank with Muon.

    Args:
        state: the training state that the rank would hold with AdamW.
        zero: the ZeRO settings.
        local: the rank's parameters.
    """
    shards = 1 if zero.layout.zero_stage == 0 else zero.shards
    moment = FP32_BYTES * -(-elements(local.shapes) // shards)
    location = {"none": "optimizer", "cpu": "host", "nvme": "nvme"}[zero.device("optimizer")]
    saved = {location: getattr(state, location) - moment}
    if state.pinned and location == "host":
        saved["pinned"] = state.pinned - moment
    gradients = state.gradients
    if zero.layout.zero_stage:  # At stage 0, the reduced copy has been freed by then.
        gradients += state.step
    if zero.layout.zero_stage in (1, 2) and location == "optimizer" and zero.accumulator == zero.element:
        # DeepSpeed frees the gradients of one parameter group after the other, and the matrices come last.
        gradients = moment + zero.bucket
    return replace(state, **saved, matrices=gradients + _workspace(zero, local, shards))


def traffic(zero: ZeroSettings, local: LocalParameters) -> tuple[int, int]:
    """Return the number of bytes that a rank sends per update to reassemble matrices and to send the results back.

    Args:
        zero: the ZeRO settings.
        local: the rank's parameters.

    Returns:
        The bytes that are sent to other ZeRO ranks, and those that are sent to other tensor-parallel ranks.
    """
    stage, shards, degree = zero.layout.zero_stage, zero.shards, zero.layout.tensor_parallel
    total = elements(local.shapes)
    owned = total if stage == 0 else -(-total // shards)
    exchanged = 0
    if stage == 3:
        exchanged = owned * (shards - 1) // shards
    elif stage > 0 and shards > 1:
        exchanged = _largest_matrix(local)  # At most one matrix crosses a partition boundary.
    return 2 * FP32_BYTES * exchanged, FP32_BYTES * owned * (degree - 1)


def _largest_matrix(local: LocalParameters) -> int:
    return max(map(math.prod, matrices(local.shapes).values()), default=0)


def _workspace(zero: ZeroSettings, local: LocalParameters, shards: int) -> int:
    """Return the peak bytes of Muon's iteration, for the largest batch of matrices that a rank reassembles."""
    degree = zero.layout.tensor_parallel
    most = 0
    for (rows, columns, blocks), count in _count_by_shape(zero.section, local, degree).items():
        size = rows * columns
        number = min(-(-count // shards), max(MATRICES_AT_ONCE // size, 1))
        short, long = sorted((rows // blocks, columns))
        room = iteration_bytes(number * size, short, long)
        most = max(most, room + (FP32_BYTES * number * size // degree if degree > 1 else 0))
    if zero.layout.zero_stage == 3:
        partition = FP32_BYTES * -(-elements(local.shapes) // shards)
        # The rank holds the elements received from other ranks, and either the workspace or the results returned to it.
        return partition + max(most, partition)
    crossing = _largest_matrix(local) if shards > 1 else 0
    return most + FP32_BYTES * crossing  # One matrix may cross a partition boundary.


def iteration_bytes(size: int, short: int, long: int) -> int:
    """Return the peak bytes of `engine.optim.muon.updates`, including its input.

    Args:
        size: total number of elements of all matrices.
        short: length of the shorter side of each matrix.
        long: length of the longer side of each matrix.
    """
    squares = size * short // long  # number of elements of all products X·Xᵀ
    if 2 * long >= 3 * short:
        # The iteration works on matrices of the size of X·Xᵀ. At its peak it holds six, or three and the result.
        return FP32_BYTES * (2 * size + max(6 * squares, size + 3 * squares))
    # The iteration works on X itself, and holds the input and intermediate results.
    return FP32_BYTES * (4 * size + 2 * squares)


def _count_by_shape(section: ModelSection, local: LocalParameters, degree: int) -> Counter[tuple[int, int, int]]:
    """Return the number of whole matrices by (rows, columns, number of row blocks that Muon treats separately)."""
    counts: Counter[tuple[int, int, int]] = Counter()
    for name, shape in matrices(local.shapes).items():
        spec = shard_spec(name, section, degree)
        rows, columns = (size * degree if spec and spec.dim == dim else size for dim, size in enumerate(shape))
        counts[rows, columns, 2 + section.n_head // section.n_kv_head if ".qkv." in name else 1] += 1
    return counts
