"""Memory and traffic of Muon where they differ from AdamW: one moment less per matrix, and whole matrices in the step.

Follows engine/optim/muon.py and engine/optim/muon_all_to_all.py tensor by tensor.
tests/unit/plan/test_muon_memory.py compares it with torch.
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
    """Return the parameters that Muon updates: the blocks' matrices."""
    return {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.count(".") > 2}


def elements(shapes: Shapes) -> int:
    """Return the number of elements of the matrices that Muon updates."""
    return sum(map(math.prod, matrices(shapes).values()))


def adjust(state: StateBytes, zero: ZeroSettings, local: LocalParameters) -> StateBytes:
    """Return the state of a rank under Muon.

    Args:
        state: what the rank would hold under AdamW
        zero: the ZeRO settings
        local: the rank's parameters

    """
    shards = 1 if zero.layout.zero_stage == 0 else zero.shards
    moment = FP32_BYTES * -(-elements(local.shapes) // shards)
    location = {"none": "optimizer", "cpu": "host", "nvme": "nvme"}[zero.device("optimizer")]
    saved = {location: getattr(state, location) - moment}
    if state.pinned and location == "host":
        saved["pinned"] = state.pinned - moment
    gradients = state.gradients
    if zero.layout.zero_stage:  # at stage 0 the reduced copy is gone by then
        gradients += state.step
    if zero.layout.zero_stage in (1, 2) and location == "optimizer" and zero.accumulator == zero.element:
        gradients = moment + zero.bucket  # DeepSpeed frees gradients group by group, and the matrices come last
    return replace(state, **saved, matrices=gradients + _workspace(zero, local, shards))


def traffic(zero: ZeroSettings, local: LocalParameters) -> tuple[int, int]:
    """Return the bytes that a rank sends per update to reassemble matrices and return the results.

    Args:
        zero: the ZeRO settings
        local: the rank's parameters

    Returns:
        Bytes between ZeRO's ranks, and between tensor-parallel ranks.

    """
    stage, shards, degree = zero.layout.zero_stage, zero.shards, zero.layout.tensor_parallel
    total = elements(local.shapes)
    owned = total if stage == 0 else -(-total // shards)
    exchanged = 0
    if stage == 3:
        exchanged = owned * (shards - 1) // shards
    elif stage > 0 and shards > 1:
        exchanged = _largest_matrix(local)  # at most one matrix crosses a partition boundary
    return 2 * FP32_BYTES * exchanged, FP32_BYTES * owned * (degree - 1)


def _largest_matrix(local: LocalParameters) -> int:
    return max(map(math.prod, matrices(local.shapes).values()), default=0)


def _workspace(zero: ZeroSettings, local: LocalParameters, shards: int) -> int:
    """Bytes of the iteration over the largest batch of matrices that a rank reassembles."""
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
        return partition + max(most, partition)  # the results of other ranks' matrices, and what is returned to them
    crossing = _largest_matrix(local) if shards > 1 else 0
    return most + FP32_BYTES * crossing  # one matrix that crosses a partition boundary


def iteration_bytes(size: int, short: int, long: int) -> int:
    """Return the peak bytes of `engine.optim.muon.updates`, including its input.

    Args:
        size: number of elements of all matrices
        short: length of the shorter side of each matrix
        long: length of the longer side

    """
    squares = size * short // long  # elements of all X·Xᵀ
    if 2 * long >= 3 * short:  # iterates on matrices of the size of X·Xᵀ: six exist at once, or three and the result
        return FP32_BYTES * (2 * size + max(6 * squares, size + 3 * squares))
    return FP32_BYTES * (4 * size + 2 * squares)  # iterates on X itself: the input and the intermediate results


def _count_by_shape(section: ModelSection, local: LocalParameters, degree: int) -> Counter[tuple[int, int, int]]:
    """Number of whole matrices by rows, columns and the blocks of rows that Muon treats separately."""
    counts: Counter[tuple[int, int, int]] = Counter()
    for name, shape in matrices(local.shapes).items():
        spec = shard_spec(name, section, degree)
        rows, columns = (size * degree if spec and spec.dim == dim else size for dim, size in enumerate(shape))
        counts[rows, columns, 2 + section.n_head // section.n_kv_head if ".qkv." in name else 1] += 1
    return counts
