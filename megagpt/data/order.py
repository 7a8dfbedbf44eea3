"""The order of training: data position → sample, as a function that needs no file, no memory and no history.

Tokens are cut into samples of seq_len + 1 that overlap by one, with another offset in each epoch (a packed source: at
its own samples); a keyed permutation shuffles the samples of an epoch. Several sources are blended by a pattern of
slots that is permuted anew for each block of positions. The whole state of a run's data is one integer, the data
position.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.data.permutation import Numbers, as_numbers, divided, keys, permute, sides
from megagpt.errors import UserError

_SHORTEST, _LONGEST = 1 << 10, 1 << 30  # slots of a blend's pattern
_OFFSET, _SAMPLE, _SLOT = 1, 2, 3  # what a key is for


class SampleLocations(NamedTuple):
    """Where samples lie, all `[count]`: number of the source, its epoch, and the first token in its .bin."""

    source: npt.NDArray[np.int64]
    epoch: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]


class Sampler:
    """Maps data positions to samples of one or more sources.

    `tokens` and `weights` are `[sources]`; a weight is the share of samples, in any unit. The sources numbered in
    `packed` are nothing but samples, one after the other. A prefix of the order holds each source at its weight to
    within one block (`block` positions). Raises UserError for a source shorter than one sample, or a weight that is
    not above 0.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        weights: Sequence[float],
        seq_len: int,
        seed: int,
        packed: Collection[int] = (),
    ) -> None:
        for number, (count, weight) in enumerate(zip(tokens, weights, strict=True)):
            _check_source(number, count, weight, seq_len)
        self.seed, self.seq_len, self.tokens = seed, seq_len, tuple(tokens)
        # One sample less than fits, so that every epoch has room for its own offset; a packed source has none.
        self.samples = tuple(
            count // (seq_len + 1) if number in packed else max(1, count // seq_len - 1)
            for number, count in enumerate(tokens)
        )
        slots = pattern(weights)
        self.block = sum(slots)
        self.shares = tuple(count / self.block for count in slots)
        self._samples = as_numbers(self.samples)
        self._steps = as_numbers([seq_len + (number in packed) for number in range(len(tokens))])
        self._spans = as_numbers(
            [
                1 if number in packed else min(seq_len, count - samples * seq_len)
                for number, (count, samples) in enumerate(zip(tokens, self.samples, strict=True))
            ]
        )
        self._sides = np.array([sides(n) for n in self.samples], dtype=np.uint64).T
        self._slots = as_numbers(slots)
        self._ends = np.cumsum(self._slots)
        self._block_sides = as_numbers(sides(self.block))

    @property
    def samples_per_epoch(self) -> int:
        """Samples of all sources together: what one pass over the data means for a run's length."""
        return sum(self.samples)

    def locate(self, positions: Sequence[int] | npt.NDArray[np.integer]) -> SampleLocations:
        """Find the samples at these data positions `[count]`; each sample comes once in an epoch of its source."""
        source, rank = self._draw(as_numbers(positions))
        which = source if len(self.tokens) > 1 else source[:1]  # one for all is worked with faster
        n = self._samples[which]
        epoch, index = divided(rank, n)
        place = which.astype(np.uint64)
        a, b = self._sides[:, which]
        sample = permute(index, n, a, b, keys(self.seed, _SAMPLE, place, epoch))
        _, offset = divided(keys(self.seed, _OFFSET, place, epoch), self._spans[which])
        start = offset + sample * self._steps[which]
        return SampleLocations(source, epoch.astype(np.int64), start.astype(np.int64))

    def _draw(self, positions: Numbers) -> tuple[npt.NDArray[np.int64], Numbers]:
        """The source of each position, and how many of its samples are counted before."""
        if self.block == 1:
            return np.zeros(len(positions), np.int64), positions
        block, index = divided(positions, as_numbers([self.block]))
        a, b = self._block_sides
        slot = permute(index, as_numbers([self.block]), a, b, keys(self.seed, _SLOT, block))
        # Slots of a source are neighbours before the permutation, so a slot knows its rank among them.
        source = np.searchsorted(self._ends, slot, side="right")
        rank = block * self._slots[source] + slot - (self._ends - self._slots)[source]
        return source, rank


def pattern(weights: Sequence[float]) -> tuple[int, ...]:
    """Slots of each source in one block, by largest remainder; one slot in all for a single source.

    The block has 1,024 slots or so many more (a power of two) that each source is within 0.1 % of its share.
    Raises UserError for shares that even 2^30 slots cannot hold.
    """
    if len(weights) == 1:
        return (1,)
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    length = _SHORTEST
    while length <= _LONGEST:
        slots = np.floor(shares * length).astype(np.int64)
        most_left_out = np.argsort(slots - shares * length, kind="stable")[: length - int(slots.sum())]
        slots[most_left_out] += 1
        if np.all(np.abs(slots / length - shares) < 1e-3 * shares):
            return tuple(slots.tolist())
        length *= 2
    least = int(np.argmin(shares))
    raise UserError(
        f"the weight of source {least} is too small a share of all ({shares[least]:.1e})",
        "data.train",
        "leave the source out, or give it at least a millionth of all",
    )


def rank_positions(
    position: int, rank: int, data_parallel: int, micro_batch: int, accumulation: int
) -> npt.NDArray[np.int64]:
    """Data positions of one data-parallel rank in the update that begins at `position`: `[accumulation, micro]`.

    Sample k of micro-step j is position + (j·data_parallel + rank)·micro_batch + k: all ranks together take the
    next data_parallel · micro_batch · accumulation positions, each once.
    """
    step = np.arange(accumulation, dtype=np.int64)[:, None] * data_parallel + rank
    return position + step * micro_batch + np.arange(micro_batch, dtype=np.int64)


def _check_source(number: int, tokens: int, weight: float, seq_len: int) -> None:
    if tokens <= seq_len:
        what = f"source {number} has {tokens:,} tokens, fewer than one sample ({seq_len + 1:,})"
        raise UserError(what, "data.train", "prepare more text, or lower model.seq_len")
    if not 0 < weight < math.inf:
        raise UserError(f"the weight of source {number} is {weight}", "data.train", "give a number above 0")
