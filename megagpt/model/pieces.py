"""The layout-free state of a run on disk: flat pieces of each parameter, by its name, in safetensors.

A piece is a stretch of one flattened fp32 tensor: a parameter's weight, or one of its moments. Each rank writes the
stretches that it owns, and reads the stretches that it needs, whoever wrote them: nobody holds everything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from megagpt.errors import UserError
from megagpt.files import Write

FOLDER = "state"
WEIGHT = "weight"
_BUCKET = 1 << 24  # elements in one file: 64 MiB, of which two copies exist while it is written
_CHUNK = 1 << 22


class Piece(NamedTuple):
    """`tensor` [numel], fp32, is what `kind` of parameter `name` holds from element `start` on."""

    kind: str
    name: str
    start: int
    tensor: Tensor


class _Stretch(NamedTuple):
    start: int
    end: int
    path: Path
    key: str


def write(pieces: Iterable[Piece], rank: int, sink: Write) -> None:
    """Write this rank's pieces, some 64 MiB at a time."""
    number, size = 0, 0
    bucket: dict[str, Tensor] = {}
    for kind, name, start, tensor in pieces:
        for offset in range(0, tensor.numel(), _BUCKET):
            part = tensor[offset : offset + _BUCKET]
            bucket[f"{kind}:{name}:{start + offset}"] = part.detach().to("cpu", torch.float32).clone()
            size += part.numel()
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
        self._index: dict[tuple[str, str], list[_Stretch]] = defaultdict(list)
        self._folder = folder

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of `kind` of a parameter, fp32. Raises UserError where some are missing."""
        result = torch.empty(numel)
        done, end = start, start + numel
        while done < end:
            stretch = self._find(kind, name, done)
            upto = min(stretch.end, end)
            with safe_open(stretch.path, "pt") as file:
                part = file.get_slice(stretch.key)[done - stretch.start : upto - stretch.start]
            result[done - start : upto - start] = part
            done = upto
        return result

    def _find(self, kind: str, name: str, element: int) -> _Stretch:
        """The stretch that holds an element; files are opened until one does."""
        while True:
            for stretch in self._index[kind, name]:
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
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a dictionary
                kind, name, start = key.split(":")
                length = file.get_slice(key).get_shape()[0]
                self._index[kind, name].append(_Stretch(int(start), int(start) + length, path, key))


def checksum(tensor: Tensor, start: int) -> int:
    """A sum over the bits of a flat fp32 stretch and their places, modulo 2^64.

    Stretches add up: whichever way a tensor is cut, the sums of its stretches have the same sum. Every change of
    one element changes it, since an odd number has an inverse modulo 2^64.
    """
    total = 0
    for offset in range(0, tensor.numel(), _CHUNK):
        part = tensor[offset : offset + _CHUNK]
        bits = part.detach().to("cpu", torch.float32).contiguous().view(torch.int32).to(torch.int64)
        places = torch.arange(start + offset, start + offset + part.numel(), dtype=torch.int64)
        total += int(((bits + 0x5851F42D) * (places * 0x14057B7EF767814E + 1)).sum())
    return total % (1 << 64)


def stretches(numel: int, size: int = _BUCKET) -> Iterator[tuple[int, int]]:
    """(start, length) of a flat tensor cut into parts of at most `size`."""
    for start in range(0, numel, size):
        yield start, min(size, numel - start)


def _file(rank: int, number: int) -> str:
    return f"{FOLDER}/rank-{rank:05d}-{number:03d}.safetensors"
