"""The weights and optimizer moments of a checkpoint: safetensors files that do not depend on the layout.

The files hold slices of flattened fp32 tensors (a parameter's weight or one of its moments) under the parameter's
name. Each rank writes the slices that it owns, and reads the slices that it needs, whichever rank wrote them. No rank
holds the whole model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megagpt.errors import UserError
from megagpt.files import WriteFile
from megagpt.model.sharding import shard_spec

if TYPE_CHECKING:
    from megagpt.config.recipe import ModelSection

FOLDER = "state"
WEIGHT = "weight"
_FILE_ELEMENTS = 1 << 24  # per file: 64 MiB, of which two copies exist while it is written
_CHUNK = 1 << 17  # elements that are read or added at once: as int64 they fit into a core's cache
_CHUNK_ON_GPU = 1 << 22  # the same on GPUs, where starting a kernel dominates; takes 100 MB


class ShardIndex(NamedTuple):
    """Which tensor-parallel shard of a parameter: shard `number` of `degree`. (0, 1) is the whole parameter."""

    number: int = 0
    degree: int = 1


class TensorSlice(NamedTuple):
    """Consecutive elements of one flattened tensor.

    Attributes:
        kind: `WEIGHT`, or the name of a moment
        name: the parameter's name in `GPT`
        start: index of the first element in the flattened shard
        tensor: [numel], fp32
        shard: the tensor-parallel shard

    """

    kind: str
    name: str
    start: int
    tensor: Tensor
    shard: ShardIndex = ShardIndex()


_WHOLE = ShardIndex()


class _StoredSlice(NamedTuple):
    start: int
    end: int
    path: Path
    key: str


def write_slices(slices: Iterable[TensorSlice], rank: int, sink: WriteFile) -> None:
    """Write the slices of one rank to files of about 64 MiB.

    Args:
        slices: the slices, consumed one by one
        rank: number of the rank, which is part of the file names
        sink: writes a file

    """
    number = 0
    size = 0
    content: dict[str, Tensor] = {}
    for kind, name, start, tensor, (index, degree) in slices:
        for offset in range(0, tensor.numel(), _FILE_ELEMENTS):
            part = tensor[offset : offset + _FILE_ELEMENTS]
            key = f"{kind}:{name}:{index}/{degree}:{start + offset}"
            content[key] = part.detach().to("cpu", torch.float32, copy=True)
            size += part.numel()
            if size >= _FILE_ELEMENTS:
                sink(_file(rank, number), save(content))
                number += 1
                size = 0
                content = {}
    if content:
        sink(_file(rank, number), save(content))


class TensorFiles:
    """Reads slices of tensors from the files of a checkpoint.

    Args:
        folder: the checkpoint
        first: rank whose files are opened first, because it wrote most of what this rank reads

    """

    def __init__(self, folder: Path, first: int = 0) -> None:
        paths = sorted((folder / FOLDER).glob("rank-*.safetensors"))
        preferred = f"rank-{first:05d}-"
        self._unopened = sorted(paths, key=lambda path: not path.name.startswith(preferred))
        self._index: dict[tuple[str, str, ShardIndex], list[_StoredSlice]] = defaultdict(list)
        self._degrees: dict[str, int] = {}
        self._folder = folder

    def read(self, kind: str, name: str, start: int, numel: int, shard: ShardIndex = _WHOLE) -> Tensor:
        """Read elements [start, start + numel) of a flattened tensor, or of a shard as it was saved.

        Args:
            kind: `WEIGHT`, or the name of a moment
            name: the parameter's name in `GPT`
            start: index of the first element
            numel: number of elements
            shard: the tensor-parallel shard

        Returns:
            The elements [numel], fp32, on the CPU.

        Raises:
            UserError: the checkpoint does not contain all of them

        """
        result = torch.empty(numel)
        position = start
        end = start + numel
        while position < end:
            stored = self._find(kind, name, shard, position)
            stop = min(stored.end, end)
            with safe_open(stored.path, "pt") as file:
                values = file.get_slice(stored.key)
                for chunk_start in range(position, stop, _CHUNK):  # each chunk is copied twice
                    chunk_end = min(chunk_start + _CHUNK, stop)
                    chunk = values[chunk_start - stored.start : chunk_end - stored.start]
                    result[chunk_start - start : chunk_end - start] = chunk
            position = stop
        return result

    def degree(self, name: str) -> int:
        """Return the number of tensor-parallel shards in which the parameter was saved."""
        while name not in self._degrees and self._unopened:
            self._open(self._unopened.pop(0))
        return self._degrees.get(name, 1)

    def read_whole(self, kind: str, name: str, shape: Sequence[int], section: ModelSection) -> Tensor:
        """Read a whole tensor, whatever number of shards it was saved in.

        Args:
            kind: `WEIGHT`, or the name of a moment
            name: the parameter's name in `GPT`
            shape: its whole shape
            section: the model

        Raises:
            UserError: the checkpoint does not contain all of it

        """
        degree, numel = self.degree(name), math.prod(shape)
        spec = shard_spec(name, section, degree)
        if degree == 1 or spec is None:
            return self.read(kind, name, 0, numel).view(*shape)
        local_shape = [length // degree if dim == spec.dim else length for dim, length in enumerate(shape)]
        indices = [ShardIndex(number, degree) for number in range(degree)]
        return spec.join([self.read(kind, name, 0, numel // degree, index).view(*local_shape) for index in indices])

    def _find(self, kind: str, name: str, shard: ShardIndex, element: int) -> _StoredSlice:
        """Open files until one of them holds the element."""
        while True:
            for stored in self._index[kind, name, shard]:
                if stored.start <= element < stored.end:
                    return stored
            if not self._unopened:
                raise UserError(
                    f"the checkpoint does not contain the {kind} of {name} from element {element} on",
                    str(self._folder),
                    "remove this checkpoint, so that the previous one is used",
                )
            self._open(self._unopened.pop(0))

    def _open(self, path: Path) -> None:
        try:
            self._index_file(path)
        except (SafetensorError, OSError, ValueError, IndexError) as error:
            what, do = (
                "this file holds no tensors of a checkpoint",
                "remove this checkpoint so that the one before it is taken",
            )
            raise UserError(f"{what}: {error}", str(path), do) from None

    def _index_file(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a dictionary
                kind, name, shard, start = key.split(":")
                index, degree = map(int, shard.split("/"))
                length = file.get_slice(key).get_shape()[0]
                stored = _StoredSlice(int(start), int(start) + length, path, key)
                self._index[kind, name, ShardIndex(index, degree)].append(stored)
                self._degrees[name] = degree


def checksum(tensor: Tensor, indices: Tensor | int) -> int:
    """Return a checksum modulo 2^64 of the bits of fp32 elements and their indices in the whole tensor.

    Checksums are additive: however a tensor is split, the checksums of its slices have the same sum. Every change of
    one element changes the checksum, because an odd number has an inverse modulo 2^64. It is computed on the tensor's
    device, and equal on all devices, because integers wrap around in the same way.

    Args:
        tensor: [numel], fp32
        indices: the index of each element [numel], or of the first of consecutive elements

    """
    chunk_size = _CHUNK_ON_GPU if tensor.is_cuda else _CHUNK
    total = 0
    counting = torch.arange(min(chunk_size, tensor.numel()), device=tensor.device)
    for offset in range(0, tensor.numel(), chunk_size):
        chunk = tensor[offset : offset + chunk_size]
        bits = chunk.detach().to(torch.float32).contiguous().view(torch.int32).to(torch.int64).add_(0x5851F42D)
        plain_sum = int(bits.sum())
        if isinstance(indices, int):
            indexed_sum = int(_dot(bits, counting[: len(bits)])) + (indices + offset) * plain_sum
        else:
            indexed_sum = int(_dot(bits, indices[offset : offset + chunk_size].to(tensor.device)))
        total += plain_sum + indexed_sum * 0x14057B7EF767814E
    return total % (1 << 64)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot product of integer vectors, for which CUDA has no kernel of its own. `a` may be overwritten."""
    return a.mul_(b).sum() if a.is_cuda else a.dot(b)


def _file(rank: int, number: int) -> str:
    return f"{FOLDER}/rank-{rank:05d}-{number:03d}.safetensors"
