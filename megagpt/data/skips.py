"""Ranges of data positions that the user excluded from training (recipe key `data.skip`)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


class SkippedRanges:
    """Ranges of data positions that are never trained on.

    All other samples stay at their positions. The remaining positions are numbered from 0 by their kept index.

    Args:
        ranges: (first, last) data positions, both inclusive, in any order; they may overlap.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        merged: list[list[int]] = []
        for first, last in sorted(ranges):
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], last + 1)
            else:
                merged.append([first, last + 1])
        self._merged = merged
        starts, ends = np.array(merged, np.int64).reshape(-1, 2).T
        self._skipped_before = np.concatenate([[0], np.cumsum(ends - starts)])  # positions in the first n ranges
        self._kept_before = starts - self._skipped_before[:-1]  # kept positions before each range

    def to_positions(self, kept_indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the data positions with these kept indices, in the same shape."""
        ranges_before = self._kept_before.searchsorted(kept_indices, "right")
        positions: npt.NDArray[np.int64] = kept_indices + self._skipped_before[ranges_before]
        return positions

    def kept_index(self, position: int) -> int:
        """Return the number of kept positions before this position, which is its own index if it is kept."""
        # bisect on a list takes a tenth of numpy's time for a single number.
        ranges_before = bisect_left(self._merged, [position])
        skipped = int(self._skipped_before[ranges_before])
        if ranges_before:  # the position may lie within the last of them
            skipped -= max(0, self._merged[ranges_before - 1][1] - position)
        return position - skipped
