"""The layout-free state of a run on disk: flat pieces of each parameter, by its name, in safetensors.

A piece is a stretch of one flattened fp32 tensor: a parameter's weight, or one of its moments. Each rank writes the
stretches that it owns, and reads the stretches that it needs, whoever wrote them: nobody holds everything.
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
from megagpt.model.sharding import cut_of

if TYPE_CHECKING:
    from megagpt.config.recipe import ModelSection

FOLDER = "state"
WEIGHT = "weight"
_BUCKET = 1 << 24  # elements in one file: 64 MiB, of which two copies exist while it is written
_CHUNK = 1 << 17  # elements that are read, or summed up, at a time: as int64 they stay in a core's cache
_CHUNK_ON_GPU = 1 << 22  # the same where kernels cost more to begin than to do; 100 MB while they run


class Part(NamedTuple):
    """Which share of a parameter that tensor parallelism has cut into `degree`; (0, 1) where it is whole."""

    number: int = 0
    degree: int = 1


class Piece(NamedTuple):
    """`tensor` [numel], fp32, is what `kind` of parameter `name` holds from element `start` of the part on."""

    kind: str
    name: str
    start: int
    tensor: Tensor
    part: Part = Part()


_WHOLE = Part()


class _Stretch(NamedTuple):
    start: int
    end: int
    path: Path
    key: str


def write(pieces: Iterable[Piece], rank: int, sink: WriteFile) -> None:
    """Write this rank's pieces, some 64 MiB at a time."""
    number, size = 0, 0
    bucket: dict[str, Tensor] = {}
    for kind, name, start, tensor, (index, degree) in pieces:
        for offset in range(0, tensor.numel(), _BUCKET):
            stretch = tensor[offset : offset + _BUCKET]
            key = f"{kind}:{name}:{index}/{degree}:{start + offset}"
            bucket[key] = stretch.detach().to("cpu", torch.float32, copy=True)
            size += stretch.numel()
            if size >= _BUCKET:
                sink(_file(rank, number), save(bucket))
                number, size, bucket = number + 1, 0, {}
    if bucket:
        sink(_file(rank, number), save(bucket))


class Pieces:
    """Reads stretches out of a checkpoint's pieces; `first` is the rank whose files are looked at first."""

    def __init__(self, folder: Path, first: int = 0) -> None:
        paths = sorted((folder / FOLDER).glob("rank-*.safetensors"))
        mine = f"rank-{first:05d}-"
        self._unread = sorted(paths, key=lambda path: not path.name.startswith(mine))
        self._index: dict[tuple[str, str, Part], list[_Stretch]] = defaultdict(list)
        self._degrees: dict[str, int] = {}
        self._folder = folder

    def read(self, kind: str, name: str, start: int, numel: int, part: Part = _WHOLE) -> Tensor:
        """Elements [start, start + numel) of one part of a tensor, as it was saved. Raises UserError for a gap."""
        result = torch.empty(numel)
        done, end = start, start + numel
        while done < end:
            stretch = self._find(kind, name, part, done)
            upto = min(stretch.end, end)
            with safe_open(stretch.path, "pt") as file:
                stored = file.get_slice(stretch.key)
                for at in range(done, upto, _CHUNK):  # each is copied twice
                    stop = min(at + _CHUNK, upto)
                    result[at - start : stop - start] = stored[at - stretch.start : stop - stretch.start]
            done = upto
        return result

    def degree(self, name: str) -> int:
        """Into how many parts the parameter was cut when it was saved."""
        while name not in self._degrees and self._unread:
            self._open(self._unread.pop(0))
        return self._degrees.get(name, 1)

    def whole(self, kind: str, name: str, shape: Sequence[int], section: ModelSection) -> Tensor:
        """A whole tensor of this shape, whatever it was cut into. Raises UserError for a gap."""
        degree, numel = self.degree(name), math.prod(shape)
        cut = cut_of(name, section, degree)
        if degree == 1 or cut is None:
            return self.read(kind, name, 0, numel).view(*shape)
        local = [length // degree if dim == cut.dim else length for dim, length in enumerate(shape)]
        parts = [self.read(kind, name, 0, numel // degree, Part(i, degree)).view(*local) for i in range(degree)]
        return cut.join(parts)

    def _find(self, kind: str, name: str, part: Part, element: int) -> _Stretch:
        """The stretch that holds an element; files are opened until one does."""
        while True:
            for stretch in self._index[kind, name, part]:
                if stretch.start <= element < stretch.end:
                    return stretch
            if not self._unread:
                raise UserError(
                    f"the checkpoint holds no {kind} of {name} from element {element} on",
                    str(self._folder),
                    "remove this checkpoint so that the one before it is taken",
                )
            self._open(self._unread.pop(0))

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
                kind, name, part, start = key.split(":")
                index, degree = map(int, part.split("/"))
                length = file.get_slice(key).get_shape()[0]
                stretch = _Stretch(int(start), int(start) + length, path, key)
                self._index[kind, name, Part(index, degree)].append(stretch)
                self._degrees[name] = degree


def checksum(tensor: Tensor, places: Tensor | int) -> int:
    """A sum over the bits of fp32 elements and their places in the whole tensor, modulo 2^64.

    `places` is the place of each element [numel], or of the first of a stretch. Stretches add up: whichever way a
    tensor is cut, the sums of its stretches have the same sum. Every change of one element changes it, since an odd
    number has an inverse modulo 2^64. It is made on the tensor's device: integers wrap around alike on all of them.
    """
    at_once = _CHUNK_ON_GPU if tensor.is_cuda else _CHUNK
    total, counting = 0, torch.arange(min(at_once, tensor.numel()), device=tensor.device)
    for offset in range(0, tensor.numel(), at_once):
        chunk = tensor[offset : offset + at_once]
        bits = chunk.detach().to(torch.float32).contiguous().view(torch.int32).to(torch.int64).add_(0x5851F42D)
        plain = int(bits.sum())
        if isinstance(places, int):
            placed = int(_dot(bits, counting[: len(bits)])) + (places + offset) * plain
        else:
            placed = int(_dot(bits, places[offset : offset + at_once].to(tensor.device)))
        total += plain + placed * 0x14057B7EF767814E
    return total % (1 << 64)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The product of two integer vectors; CUDA has no kernel of its own for it. `a` may be overwritten."""
    return a.mul_(b).sum() if a.is_cuda else a.dot(b)


def _file(rank: int, number: int) -> str:
    return f"{FOLDER}/rank-{rank:05d}-{number:03d}.safetensors"
