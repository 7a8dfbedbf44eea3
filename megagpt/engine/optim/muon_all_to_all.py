"""Distributed Muon, which reassembles each matrix that ZeRO has partitioned on one rank for the optimizer step.

Between updates each rank keeps its range of weights and momentum, as with AdamW. In the step, all fragments of a matrix
are sent to one of the ranks that hold a fragment of it. That rank computes the update and sends its fragments back. At
stages 1 and 2, only matrices that extend over several ranks are sent. At stage 3, all matrices are. Tensor-parallel
shards of a matrix are gathered on all ranks that hold one. DeepSpeed's bf16 optimizer distributes its own Muon in the
same way (runtime/bf16_optimizer.py), but DeepSpeed's other optimizers reassemble every matrix on every rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megagpt.engine.parallel import tensor
from megagpt.engine.parallel.tensor import TensorParallelGroup
from megagpt.model.flops import MATRICES_AT_ONCE
from megagpt.model.sharding import ShardSpec

ComputeUpdates = Callable[[Tensor], Tensor]
"""type of the function that computes the updates of matrices [number, rows, columns]"""


@dataclass(frozen=True)
class Matrix:
    """Shape of a matrix, or of a rank's tensor-parallel shard of a matrix, before ZeRO partitions it."""

    shape: torch.Size
    shard_spec: ShardSpec | None = None


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements [start, start + numel) of a flattened matrix, at index `offset` in a rank's range of the flat buffer."""

    matrix: int
    rank: int
    start: int
    numel: int
    offset: int


class MuonAllToAll:
    """Plan for one flat buffer that assigns each matrix to a rank, and exchanges its fragments with all-to-all.

    Args:
        matrices: The matrices of the flat buffer.
        fragments: The fragments of these matrices on all ranks of the group.
        group: Process group of the ranks over which the flat buffer is partitioned.
        tensor_parallel: The tensor-parallel group of this rank.
        device: Device on which updates are computed, even if the flat buffer is in host memory.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        fragments: Sequence[Fragment],
        group: Any,
        tensor_parallel: TensorParallelGroup,
        device: Any,
    ) -> None:
        self._matrices = matrices
        self._group = group
        self._tensor_parallel = tensor_parallel
        self._device = device
        self._rank = torch.distributed.get_rank(group)
        ranks = torch.distributed.get_world_size(group)
        owners = assign_owners(matrices, fragments, ranks)
        self._owned: dict[int, list[Fragment]] = {n: [] for n, owner in enumerate(owners) if owner == self._rank}
        for fragment in fragments:
            if owners[fragment.matrix] == self._rank:
                self._owned[fragment.matrix].append(fragment)
        # Senders and receivers order fragments by the rank at the other end, and then by matrix.
        sent = [(owners[f.matrix], f) for f in fragments if f.rank == self._rank != owners[f.matrix]]
        sent.sort(key=lambda item: (item[0], item[1].matrix))
        received = [f for f in fragments if f.rank != self._rank == owners[f.matrix]]
        received.sort(key=lambda fragment: (fragment.rank, fragment.matrix))
        self._sent = [fragment for _, fragment in sent]
        self._send_counts = [0] * ranks
        self._recv_counts = [0] * ranks
        for owner, fragment in sent:
            self._send_counts[owner] += fragment.numel
        self._recv_offsets: dict[Fragment, int] = {}
        for fragment in received:
            self._recv_offsets[fragment] = sum(self._recv_counts)
            self._recv_counts[fragment.rank] += fragment.numel
        # This value must be the same on every rank, because the exchange is collective.
        self._communicates = any(fragment.rank != owners[fragment.matrix] for fragment in fragments)

    def replace_by_updates(self, flat: Tensor, compute_updates: ComputeUpdates) -> None:
        """Replace every matrix in this rank's range of the flat buffer by its update. Collective.

        Args:
            flat: This rank's range of the flat buffer [numel], which is overwritten.
            compute_updates: Function that computes the updates of whole matrices.
        """
        received = flat.new_empty(sum(self._recv_counts), device=self._device)
        if self._communicates:
            fragments = [flat.narrow(0, fragment.offset, fragment.numel) for fragment in self._sent]
            sent = torch.cat([flat.new_empty(0), *fragments]).to(self._device)
            self._all_to_all(sent, received, self._send_counts, self._recv_counts)
        for spec, batch in self._batches():
            stacked = torch.stack([self._reassemble(flat, received, number) for number in batch])
            for number, update in zip(batch, self._local_updates(stacked, spec, compute_updates), strict=True):
                for fragment, view in self._views(flat, received, number):
                    view.copy_(update.reshape(-1).narrow(0, fragment.start, fragment.numel))
        if self._communicates:
            returned = received.new_empty(sum(self._send_counts))
            self._all_to_all(received, returned, self._recv_counts, self._send_counts)
            sizes = [fragment.numel for fragment in self._sent]
            for fragment, update in zip(self._sent, returned.split(sizes), strict=True):
                flat.narrow(0, fragment.offset, fragment.numel).copy_(update)

    def _local_updates(self, matrices: Tensor, spec: ShardSpec | None, compute_updates: ComputeUpdates) -> Tensor:
        """Gather the tensor-parallel shards, compute updates of whole matrices, and return this rank's shards of them.

        Collective over the tensor-parallel group if the matrices are sharded.
        """
        if spec is None:
            return compute_updates(matrices)
        spec = replace(spec, dim=spec.dim + 1)  # the matrices are stacked along dimension 0
        whole = tensor.gather_shards(matrices, spec, self._tensor_parallel)
        return spec.shard(compute_updates(whole), self._tensor_parallel.index, self._tensor_parallel.degree)

    def _batches(self) -> Iterator[tuple[ShardSpec | None, list[int]]]:
        """Yield batches of matrices that this rank reassembles. The matrices of a batch have equal shape and split."""
        alike: dict[Matrix, list[int]] = defaultdict(list)
        for number in self._owned:
            alike[self._matrices[number]].append(number)
        for matrix, numbers in alike.items():
            for batch in split_into_batches(numbers, matrix.shape.numel() * self._tensor_parallel.degree):
                yield matrix.shard_spec, batch

    def _reassemble(self, flat: Tensor, received: Tensor, number: int) -> Tensor:
        """Return a matrix that this rank reassembles. The result is a view if the matrix has a single fragment."""
        shape = self._matrices[number].shape
        views = self._views(flat, received, number)
        if len(views) == 1:
            return views[0][1].view(shape).to(self._device)
        matrix = received.new_empty(shape)
        for fragment, view in views:
            matrix.view(-1).narrow(0, fragment.start, fragment.numel).copy_(view)
        return matrix

    def _views(self, flat: Tensor, received: Tensor, number: int) -> list[tuple[Fragment, Tensor]]:
        """Return each fragment of a matrix, with a view of it in this rank's range or in the received elements."""
        views = []
        for fragment in self._owned[number]:
            if fragment.rank == self._rank:
                view = flat.narrow(0, fragment.offset, fragment.numel)
            else:
                view = received.narrow(0, self._recv_offsets[fragment], fragment.numel)
            views.append((fragment, view))
        return views

    def _all_to_all(self, source: Tensor, target: Tensor, send_counts: list[int], recv_counts: list[int]) -> None:
        torch.distributed.all_to_all_single(target, source, recv_counts, send_counts, group=self._group)


def split_into_batches(matrices: Sequence[Any], numel: int) -> Iterator[list[Any]]:
    """Yield batches of matrices with `numel` elements each. Muon orthogonalizes the matrices of a batch together."""
    batch_size = max(MATRICES_AT_ONCE // numel, 1)
    for first in range(0, len(matrices), batch_size):
        yield list(matrices[first : first + batch_size])


def assign_owners(matrices: Sequence[Matrix], fragments: Sequence[Fragment], ranks: int) -> list[int]:
    """Choose the rank that reassembles each matrix.

    Of the ranks that hold a fragment of a matrix, the one with the fewest elements to reassemble so far is chosen.

    Args:
        matrices: The matrices of a flat buffer.
        fragments: The fragments of these matrices on all ranks.
        ranks: Number of ranks over which the flat buffer is partitioned.

    Returns:
        The chosen rank of each matrix.
    """
    holders: dict[int, list[int]] = defaultdict(list)
    for fragment in fragments:
        holders[fragment.matrix].append(fragment.rank)
    load = [0] * ranks
    owners = []
    for number, matrix in enumerate(matrices):
        owner = min(holders[number], key=lambda rank: (load[rank], rank))
        owners.append(owner)
        load[owner] += matrix.shape.numel()
    return owners
