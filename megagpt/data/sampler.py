"""Maps data positions to samples with a pure function, which needs no index files and only constant memory.

The tokens of a source are divided into samples of seq_len + 1 tokens that overlap by one token. Each epoch of a source
starts at a different offset, and a keyed permutation shuffles its samples. A packed source consists of separate
samples, so that only their order changes between epochs. Several sources are blended by a pattern of slots, which is
shuffled differently in each block of data positions. The complete state of a run's data order is a single integer, the
data position.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.data.permutation import UInt64Array, as_uint64, derive_keys, fast_divmod, permute, radices
from megagpt.errors import UserError

_MIN_BLOCK, _MAX_BLOCK = 1 << 10, 1 << 30  # minimum and maximum number of slots in the pattern of a blend
_OFFSET_KEY, _SAMPLE_KEY, _SLOT_KEY = 1, 2, 3  # numbers that make the keys for different purposes different


class SampleLocations(NamedTuple):
    """Locations of samples. All arrays have the shape `[count]`.

    Attributes:
        source: index of each sample's source.
        epoch: epoch of that source.
        start: index of the sample's first token in the source.
    """

    source: npt.NDArray[np.int64]
    epoch: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]


class Sampler:
    """Maps data positions to samples of one or more sources.

    Among the first n samples, for any n, the number of samples from each source is n times the fraction of that source,
    to within one block.

    Args:
        tokens: number of tokens in each source, `[sources]`.
        weights: relative number of samples from each source, `[sources]`. Weights need not add up to 1.
        seq_len: tokens per sample, without the last label.
        seed: seed of all permutations and offsets.
        packed: indices of the packed sources, which consist of separate samples of seq_len + 1 tokens.

    Attributes:
        samples: number of samples per epoch of each source.
        fractions: fraction of all samples that come from each source.
        block_size: number of data positions per block.

    Raises:
        UserError: a source is shorter than one sample, or a weight is not positive and finite.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        weights: Sequence[float],
        seq_len: int,
        seed: int,
        packed: Collection[int] = (),
    ) -> None:
        for index, (count, weight) in enumerate(zip(tokens, weights, strict=True)):
            _check_source(index, count, weight, seq_len)
        self.seed = seed
        self.seq_len = seq_len
        self.tokens = tuple(tokens)
        # There is one sample fewer than would fit, so that every epoch can start at a different offset. This does not
        # apply to packed sources, whose epochs all start at offset 0.
        self.samples = tuple(
            count // (seq_len + 1) if index in packed else max(1, count // seq_len - 1)
            for index, count in enumerate(tokens)
        )
        slots = blend_slots(weights)
        self.block_size = sum(slots)
        self.fractions = tuple(count / self.block_size for count in slots)
        self._samples = as_uint64(self.samples)
        self._strides = as_uint64([seq_len + 1 if index in packed else seq_len for index in range(len(tokens))])
        self._offset_limits = as_uint64(
            [
                1 if index in packed else min(seq_len, count - samples * seq_len)
                for index, (count, samples) in enumerate(zip(tokens, self.samples, strict=True))
            ]
        )
        self._radices = np.array([radices(n) for n in self.samples], dtype=np.uint64).T
        self._slots = as_uint64(slots)
        self._slot_ends = np.cumsum(self._slots)
        self._block_radices = as_uint64(radices(self.block_size))

    @property
    def samples_per_epoch(self) -> int:
        """Total number of samples per epoch of all sources, which is the length of one epoch of a run."""
        return sum(self.samples)

    def locate(self, positions: Sequence[int] | npt.NDArray[np.integer]) -> SampleLocations:
        """Return the locations of the samples at data positions `[count]`.

        Each sample occurs once per epoch of its source.
        """
        source, rank = self._assign_sources(as_uint64(positions))
        # With a single source, arrays of one element are faster than arrays `[count]`.
        index = source if len(self.tokens) > 1 else source[:1]
        samples = self._samples[index]
        epoch, rank_in_epoch = fast_divmod(rank, samples)
        source_key = index.astype(np.uint64)
        a, b = self._radices[:, index]
        sample = permute(rank_in_epoch, samples, a, b, derive_keys(self.seed, _SAMPLE_KEY, source_key, epoch))
        offset_key = derive_keys(self.seed, _OFFSET_KEY, source_key, epoch)
        _, offset = fast_divmod(offset_key, self._offset_limits[index])
        start = offset + sample * self._strides[index]
        return SampleLocations(source, epoch.astype(np.int64), start.astype(np.int64))

    def _assign_sources(self, positions: UInt64Array) -> tuple[npt.NDArray[np.int64], UInt64Array]:
        """Return the source of each position, and the rank of the position among the positions of that source."""
        if self.block_size == 1:
            return np.zeros(len(positions), np.int64), positions
        size = as_uint64([self.block_size])
        block, index = fast_divmod(positions, size)
        a, b = self._block_radices
        slot = permute(index, size, a, b, derive_keys(self.seed, _SLOT_KEY, block))
        # Before the permutation, the slots of a source are consecutive. The number of a slot therefore determines its
        # rank among the slots of its source.
        source = np.searchsorted(self._slot_ends, slot, side="right")
        rank = block * self._slots[source] + slot - (self._slot_ends - self._slots)[source]
        return source, rank


def blend_slots(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the number of slots of each source in one block, computed by the largest-remainder method.

    The size of a block is the smallest power of two, from 2^10 to 2^30, with which the fraction of every source is
    within 0.1 % of its target. With a single source, a block is a single slot. Raises UserError if even 2^30 slots are
    not enough.
    """
    if len(weights) == 1:
        return (1,)
    fractions = np.asarray(weights, dtype=np.float64) / sum(weights)
    length = _MIN_BLOCK
    while length <= _MAX_BLOCK:
        slots = np.floor(fractions * length).astype(np.int64)
        largest_remainders = np.argsort(slots - fractions * length, kind="stable")[: length - int(slots.sum())]
        slots[largest_remainders] += 1
        if np.all(np.abs(slots / length - fractions) < 1e-3 * fractions):
            return tuple(slots.tolist())
        length *= 2
    smallest = int(np.argmin(fractions))
    raise UserError(
        f"the weight of source {smallest} is too small a fraction of the total ({fractions[smallest]:.1e})",
        "data.train",
        "remove the source, or give it at least a millionth of the total weight",
    )


def rank_positions(
    position: int, rank: int, data_parallel: int, micro_batch: int, accumulation: int
) -> npt.NDArray[np.int64]:
    """Return the data positions of one data-parallel rank in one update, `[accumulation, micro_batch]`.

    Sample k of micro-batch j is at position + (j·data_parallel + rank)·micro_batch + k. All ranks together therefore
    use each of the next data_parallel · micro_batch · accumulation positions exactly once.

    Args:
        position: data position at which the update starts.
        rank: data-parallel rank.
        data_parallel: number of data-parallel ranks.
        micro_batch: samples per micro-batch.
        accumulation: micro-batches per update and rank.
    """
    step = np.arange(accumulation, dtype=np.int64)[:, None] * data_parallel + rank
    return position + step * micro_batch + np.arange(micro_batch, dtype=np.int64)


def _check_source(index: int, tokens: int, weight: float, seq_len: int) -> None:
    if tokens <= seq_len:
        what = f"source {index} has {tokens:,} tokens, fewer than one sample ({seq_len + 1:,})"
        raise UserError(what, "data.train", "prepare more text, or lower model.seq_len")
    if not 0 < weight < math.inf:
        raise UserError(f"the weight of source {index} is {weight}", "data.train", "give a finite number above 0")
