"""Maps data positions to samples, as a pure function: no index files, no memory that grows, no history.

The tokens of a source are divided into samples of seq_len + 1 tokens that overlap by one token. Each epoch of a source
starts at another offset, and a keyed permutation shuffles its samples. (A packed source consists of separate samples;
only their order changes.) Several sources are blended by a pattern of slots, which is shuffled differently in each
block of data positions. The complete state of a run's data order is one integer, the data position.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.data.permutation import UInt64Array, as_uint64, derive_keys, fast_divmod, permute, radices
from megagpt.errors import UserError

_MIN_BLOCK, _MAX_BLOCK = 1 << 10, 1 << 30  # slots of a blend's pattern
_OFFSET_KEY, _SAMPLE_KEY, _SLOT_KEY = 1, 2, 3  # so that keys for different purposes differ


class SampleLocations(NamedTuple):
    """Locations of samples, each array `[count]`.

    Attributes:
        source: index of the source.
        epoch: epoch of that source.
        start: offset of the sample's first token in the source.
    """

    source: npt.NDArray[np.int64]
    epoch: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]


class Sampler:
    """Maps data positions to samples of one or more sources.

    In every prefix of the order, each source has its fraction of the samples to within one block.

    Args:
        tokens: tokens per source, `[sources]`.
        weights: relative number of samples per source, in any unit, `[sources]`.
        seq_len: tokens per sample, without the last label.
        seed: seed of all permutations and offsets.
        packed: indices of the sources that are packed, i.e. consist of separate samples of seq_len + 1 tokens.

    Attributes:
        samples: samples per epoch of each source.
        fractions: fraction of all samples that come from each source.
        block_size: data positions per block.

    Raises:
        UserError: a source is shorter than one sample, or a weight is not above 0.
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
        # One sample fewer than would fit, so that every epoch can start at its own offset; packed sources have none.
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
        """Samples per epoch of all sources together, which define one epoch of a run."""
        return sum(self.samples)

    def locate(self, positions: Sequence[int] | npt.NDArray[np.integer]) -> SampleLocations:
        """Locate the samples at data positions `[count]`. Each sample occurs once per epoch of its source."""
        source, rank = self._assign_sources(as_uint64(positions))
        # With a single source, scalars in place of arrays `[count]` are faster.
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
        """Return the source of each position, and the number of that source's samples at earlier positions."""
        if self.block_size == 1:
            return np.zeros(len(positions), np.int64), positions
        size = as_uint64([self.block_size])
        block, index = fast_divmod(positions, size)
        a, b = self._block_radices
        slot = permute(index, size, a, b, derive_keys(self.seed, _SLOT_KEY, block))
        # Before the permutation the slots of a source are consecutive, so a slot's number gives its rank among them.
        source = np.searchsorted(self._slot_ends, slot, side="right")
        rank = block * self._slots[source] + slot - (self._slot_ends - self._slots)[source]
        return source, rank


def blend_slots(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the slots of each source in one block, by the largest-remainder method; one slot for a single source.

    A block has 1,024 slots, or the lowest power of two above that brings each source within 0.1 % of its fraction.
    Raises UserError if not even 2^30 slots do.
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

    Sample k of micro-batch j is at position + (j·data_parallel + rank)·micro_batch + k, so that all ranks together
    take the next data_parallel · micro_batch · accumulation positions, each once.

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
