"""Write and read the weights and optimizer moments of a checkpoint, in a format that does not depend on the layout.

The safetensors files of a checkpoint hold slices of flattened fp32 tensors. Each tensor is the weight or a moment of a
parameter and is stored under the parameter's name. Each rank writes the slices that it owns, and reads the slices that
it needs, no matter which rank wrote them. No rank has to hold the whole model.
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
# Number of fp32 elements per file of 64 MiB. While a file is written, there are two copies of its content in memory.
_FILE_ELEMENTS = 1 << 24
# Number of elements that are read or summed at once. As int64 they fit into a core's cache.
_CHUNK = 1 << 17
# Number of elements that are summed at once on a GPU, where smaller chunks are dominated by the time to start a kernel.
# A chunk takes 100 MB of GPU memory.
_CHUNK_ON_GPU = 1 << 22


class ShardIndex(NamedTuple):
    """Index `number` of a tensor-parallel shard among `degree` shards. (0, 1) is the whole parameter."""

    number: int = 0
    degree: int = 1


class TensorSlice(NamedTuple):
    """Slice of consecutive elements of one flattened tensor.

    Attributes:
        kind: `WEIGHT`, or the name of a moment
        name: name of the parameter in `GPT`
        start: index of the first element in the flattened shard
        tensor: elements of the slice, fp32 [numel]
        shard: tensor-parallel shard that contains the slice

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
        slices: iterable of slices, which is consumed one slice at a time
        rank: index of the rank, which is part of the file names
        sink: function that writes a file

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
    """Reader of slices of tensors from the files of a checkpoint.

    Args:
        folder: folder of the checkpoint
        first: rank whose files are opened first, because they are likely to contain most slices that this rank needs

    """

    def __init__(self, folder: Path, first: int = 0) -> None:
        paths = sorted((folder / FOLDER).glob("rank-*.safetensors"))
        preferred = f"rank-{first:05d}-"
        self._unopened = sorted(paths, key=lambda path: not path.name.startswith(preferred))
        self._index: dict[tuple[str, str, ShardIndex], list[_StoredSlice]] = defaultdict(list)
        self._degrees: dict[str, int] = {}
        self._folder = folder

    def read(self, kind: str, name: str, start: int, numel: int, shard: ShardIndex = _WHOLE) -> Tensor:
        """Read elements [start, start + numel) of a flattened tensor, or of a shard that was saved.

        Args:
            kind: `WEIGHT`, or the name of a moment
            name: name of the parameter in `GPT`
            start: index of the first element
            numel: number of elements
            shard: tensor-parallel shard to read from

        Returns:
            The elements, an fp32 tensor [numel] on the CPU.

        Raises:
            UserError: if the checkpoint does not contain all of these elements

        """
        result = torch.empty(numel)
        position = start
        end = start + numel
        while position < end:
            stored = self._find(kind, name, shard, position)
            stop = min(stored.end, end)
            with safe_open(stored.path, "pt") as file:
                values = file.get_slice(stored.key)
                for chunk_start in range(position, stop, _CHUNK):  # small chunks, because each one is copied twice
                    chunk_end = min(chunk_start + _CHUNK, stop)
                    chunk = values[chunk_start - stored.start : chunk_end - stored.start]
                    result[chunk_start - start : chunk_end - start] = chunk
            position = stop
        return result

    def degree(self, name: str) -> int:
        """Return the number of tensor-parallel shards in which a parameter was saved."""
        while name not in self._degrees and self._unopened:
            self._open(self._unopened.pop(0))
        return self._degrees.get(name, 1)

    def read_whole(self, kind: str, name: str, shape: Sequence[int], section: ModelSection) -> Tensor:
        """Read a whole tensor, which may have been saved in any number of shards.

        Args:
            kind: `WEIGHT`, or the name of a moment
            name: name of the parameter in `GPT`
            shape: shape of the whole parameter
            section: model section of the recipe

        Returns:
            The tensor in fp32 on the CPU, with the given shape.

        Raises:
            UserError: if the checkpoint does not contain all elements of the tensor

        """
        degree, numel = self.degree(name), math.prod(shape)
        spec = shard_spec(name, section, degree)
        if degree == 1 or spec is None:
            return self.read(kind, name, 0, numel).view(*shape)
        local_shape = [length // degree if dim == spec.dim else length for dim, length in enumerate(shape)]
        indices = [ShardIndex(number, degree) for number in range(degree)]
        return spec.join([self.read(kind, name, 0, numel // degree, index).view(*local_shape) for index in indices])

    def _find(self, kind: str, name: str, shard: ShardIndex, element: int) -> _StoredSlice:
        """Open files until one of them contains the element, and return the stored slice with it."""
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
    """Return a checksum, modulo 2^64, of fp32 elements and of their indices in the whole tensor.

    The checksum of a tensor is the sum of the checksums of its slices, for every way of splitting the tensor. Every
    change of one element changes the checksum, because odd numbers have an inverse modulo 2^64. The checksum is
    computed on the tensor's device. The result is the same on all devices, because integers wrap around in the same way
    on all of them.

    Args:
        tensor: elements [numel], fp32
        indices: index of each element [numel], or the index of the first element if they are consecutive

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
    """Return the dot product of integer vectors, for which torch has no CUDA kernel. May overwrite `a`."""
    return a.mul_(b).sum() if a.is_cuda else a.dot(b)


def _file(rank: int, number: int) -> str:
    return f"{FOLDER}/rank-{rank:05d}-{number:03d}.safetensors"
