"""What Muon takes otherwise than AdamW: a moment less for each matrix, and in the step room to make matrices whole.

Follows engine/optim/muon.py and engine/optim/muon_all_to_all.py tensor by tensor; tests/unit/plan/test_muon_memory.py holds it to torch.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from megagpt.model import flops
from megagpt.model.sharding import cut_of

if TYPE_CHECKING:
    from megagpt.config.recipe import ModelSection
    from megagpt.plan.states import Held, States, Zero

_FP32 = 4  # in which Muon works, whatever the precision


def matrices(shapes: flops.Shapes) -> flops.Shapes:
    """Those parameters that Muon serves: the blocks' matrices."""
    return {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.count(".") > 2}


def elements(shapes: flops.Shapes) -> int:
    """All of their elements."""
    return sum(map(math.prod, matrices(shapes).values()))


def applied(found: States, zero: Zero, mine: Held) -> States:
    """What a rank holds under Muon, of what it would hold under AdamW."""
    shards = 1 if zero.layout.zero_stage == 0 else zero.shards
    share = _FP32 * -(-elements(mine.shapes) // shards)
    place = {"none": "optimizer", "cpu": "host", "nvme": "nvme"}[zero.device("optimizer")]
    less = {place: getattr(found, place) - share}
    if found.pinned and place == "host":
        less["pinned"] = found.pinned - share
    gradients = found.gradients + (found.step if zero.layout.zero_stage else 0)  # at 0 the reduced copy is gone by then
    if zero.layout.zero_stage in (1, 2) and place == "optimizer" and zero.accumulator == zero.element:
        gradients = share + zero.bucket  # DeepSpeed frees gradients group by group, and the matrices come last
    return replace(found, **less, matrices=gradients + _room(zero, mine, shards))


def traffic(zero: Zero, mine: Held) -> tuple[int, int]:
    """Bytes that a rank sends in an update between ZeRO's ranks, there and back, and between tensor parts."""
    stage, shards, degree = zero.layout.zero_stage, zero.shards, zero.layout.tensor_parallel
    total = elements(mine.shapes)
    owned = total if stage == 0 else -(-total // shards)
    across = 0
    if stage == 3:
        across = owned * (shards - 1) // shards
    elif stage > 0 and shards > 1:
        across = max(map(math.prod, matrices(mine.shapes).values()), default=0)  # at most one lies across a border
    return 2 * _FP32 * across, _FP32 * owned * (degree - 1)


def _room(zero: Zero, mine: Held, shards: int) -> int:
    """Bytes of the tensors in the iteration over the largest batch of matrices that a rank makes whole."""
    degree = zero.layout.tensor_parallel
    most = 0
    for (rows, columns, parts), count in _alike(zero.section, mine, degree).items():
        size = rows * columns
        number = min(-(-count // shards), max(flops.MATRICES_AT_ONCE // size, 1))
        short, long = sorted((rows // parts, columns))
        room = iteration(number * size, short, long)
        most = max(most, room + (_FP32 * number * size // degree if degree > 1 else 0))
    if zero.layout.zero_stage == 3:
        share = _FP32 * -(-elements(mine.shapes) // shards)
        return share + max(most, share)  # what came of other ranks' matrices, and what goes back to them
    across = max(map(math.prod, matrices(mine.shapes).values()), default=0) if shards > 1 else 0
    return most + _FP32 * across  # one that lies across a border


def iteration(size: int, short: int, long: int) -> int:
    """Bytes at the worst moment of muon.updates on matrices of so many elements together, themselves among them."""
    squares = size * short // long  # elements of all X·Xᵀ
    if 2 * long >= 3 * short:  # through X·Xᵀ alone: six of them, or three and the result
        return _FP32 * (2 * size + max(6 * squares, size + 3 * squares))
    return _FP32 * (4 * size + 2 * squares)  # the start, and one after the other of what comes of it


def _alike(section: ModelSection, mine: Held, degree: int) -> Counter[tuple[int, int, int]]:
    """Rows, columns and parts of the whole matrices, and how many there are."""
    found: Counter[tuple[int, int, int]] = Counter()
    for name, shape in matrices(mine.shapes).items():
        cut = cut_of(name, section, degree)
        rows, columns = (size * degree if cut and cut.dim == dim else size for dim, size in enumerate(shape))
        found[rows, columns, 2 + section.n_head // section.n_kv_head if ".qkv." in name else 1] += 1
    return found
