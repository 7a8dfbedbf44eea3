"""Matrices whole for a moment: what ZeRO and tensor parallelism have cut of them comes together on one rank.

Between updates every rank keeps its stretch of weights and momentum, as with AdamW. In the step the parts of a matrix
go to one of the ranks that hold some of it, and its update goes back: at stages 1 and 2 few matrices lie across a
border between ranks, at stage 3 all do. Tensor parts are joined by all ranks that hold one. As DeepSpeed's own Muon in
bf16 (runtime/bf16_optimizer.py); its other stages make every matrix whole on every rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megagpt.engine.parallel import tensor
from megagpt.engine.parallel.tensor import Parts
from megagpt.model.flops import MATRICES_AT_ONCE
from megagpt.model.sharding import ShardSpec

Solve = Callable[[Tensor], Tensor]  # matrices [number, rows, columns] to their updates


@dataclass(frozen=True)
class Matrix:
    """What a rank without ZeRO would hold: a matrix of this shape, or a tensor-parallel part of one."""

    shape: torch.Size
    cut: ShardSpec | None = None


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements [start, start + numel) of a flattened matrix, at `place` of a rank's flat stretch."""

    matrix: int
    rank: int
    start: int
    numel: int
    place: int


class Exchange:
    """The matrices of one flat tensor that the ranks of `group` hold stretches of, and who makes which whole."""

    def __init__(
        self, matrices: Sequence[Matrix], fragments: Sequence[Fragment], group: Any, parts: Parts, device: Any
    ) -> None:
        self._matrices, self._group, self._parts, self._device = matrices, group, parts, device
        self._rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        owners = owners_of(matrices, fragments, ranks)
        self._of: dict[int, list[Fragment]] = {n: [] for n, owner in enumerate(owners) if owner == self._rank}
        for one in fragments:
            if owners[one.matrix] == self._rank:
                self._of[one.matrix].append(one)
        # what this rank sends, and what comes to it: on both sides in order of the other rank, and then of matrices
        self._sent = [(owners[one.matrix], one) for one in fragments if one.rank == self._rank != owners[one.matrix]]
        self._sent.sort(key=lambda item: (item[0], item[1].matrix))
        here = [one for one in fragments if one.rank != self._rank == owners[one.matrix]]
        here.sort(key=lambda one: (one.rank, one.matrix))
        self._going, self._coming = [0] * ranks, [0] * ranks
        for owner, one in self._sent:
            self._going[owner] += one.numel
        self._arrives: dict[Fragment, int] = {}
        for one in here:
            self._arrives[one] = sum(self._coming)
            self._coming[one.rank] += one.numel
        self._moves = any(one.rank != owners[one.matrix] for one in fragments)  # the same answer on every rank

    def put_updates(self, flat: Tensor, solve: Solve) -> None:
        """Put its update in the place of every matrix in `flat`, this rank's stretch; collective."""
        came = flat.new_empty(sum(self._coming), device=self._device)
        if self._moves:
            gone = [flat.narrow(0, one.place, one.numel) for _, one in self._sent]
            self._send(torch.cat([flat.new_empty(0), *gone]).to(self._device), came, self._going, self._coming)
        for cut, batch in self._batches():
            stacked = torch.stack([self._whole(flat, came, number) for number in batch])
            for number, update in zip(batch, self._solved(stacked, cut, solve), strict=True):
                for one, place in self._places(flat, came, number):
                    place.copy_(update.reshape(-1).narrow(0, one.start, one.numel))
        if self._moves:
            back = came.new_empty(sum(self._going))
            self._send(came, back, self._coming, self._going)
            for (_, one), update in zip(self._sent, back.split([one.numel for _, one in self._sent]), strict=True):
                flat.narrow(0, one.place, one.numel).copy_(update)

    def _solved(self, matrices: Tensor, cut: ShardSpec | None, solve: Solve) -> Tensor:
        """`solve` of whole matrices, of which this rank has these tensor parts: its part of the result; collective."""
        if cut is None:
            return solve(matrices)
        cut, parts = replace(cut, dim=cut.dim + 1), self._parts  # the matrices are stacked
        return cut.shard(solve(tensor.whole(matrices, cut, parts.group, parts.degree)), parts.index, parts.degree)

    def _batches(self) -> Iterator[tuple[ShardSpec | None, list[int]]]:
        """This rank's matrices, those of one shape and cut together."""
        alike: dict[Matrix, list[int]] = defaultdict(list)
        for number in self._of:
            alike[self._matrices[number]].append(number)
        for matrix, numbers in alike.items():
            for batch in batches(numbers, matrix.shape.numel() * self._parts.degree):
                yield matrix.cut, batch

    def _whole(self, flat: Tensor, came: Tensor, number: int) -> Tensor:
        shape = self._matrices[number].shape
        places = self._places(flat, came, number)
        if len(places) == 1:
            return places[0][1].view(shape).to(self._device)
        whole = came.new_empty(shape)
        for one, place in places:
            whole.view(-1).narrow(0, one.start, one.numel).copy_(place)
        return whole

    def _places(self, flat: Tensor, came: Tensor, number: int) -> list[tuple[Fragment, Tensor]]:
        """Where the parts of one of this rank's matrices are: in its stretch, and in what came."""
        return [
            (one, flat.narrow(0, one.place, one.numel))
            if one.rank == self._rank
            else (one, came.narrow(0, self._arrives[one], one.numel))
            for one in self._of[number]
        ]

    def _send(self, source: Tensor, target: Tensor, sizes: list[int], coming: list[int]) -> None:
        torch.distributed.all_to_all_single(target, source, coming, sizes, group=self._group)


def batches(numbers: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Matrices of `size` elements each, in groups that go through the iteration together."""
    most = max(MATRICES_AT_ONCE // size, 1)
    for first in range(0, len(numbers), most):
        yield list(numbers[first : first + most])


def owners_of(matrices: Sequence[Matrix], fragments: Sequence[Fragment], ranks: int) -> list[int]:
    """Which rank makes each matrix whole: of those that hold some of it, the one with the least to do so far."""
    holders: dict[int, list[int]] = defaultdict(list)
    for one in fragments:
        holders[one.matrix].append(one.rank)
    load, owners = [0] * ranks, []
    for number, matrix in enumerate(matrices):
        owners.append(min(holders[number], key=lambda rank: (load[rank], rank)))
        load[owners[-1]] += matrix.shape.numel()
    return owners
