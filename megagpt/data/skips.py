"""Ranges of data positions that the user has excluded from training with the recipe key `data.skip`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


class SkippedRanges:
    """Ranges of data positions that are never trained on.

    All other samples stay at their positions. The kept positions are numbered consecutively from 0, and the number of a
    kept position is called its kept index.

    Args:
        ranges: ranges as pairs (first, last) of data positions, with both ends included. They may overlap and be in any
            order.
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
        # Number of positions in the first n ranges, for each n.
        self._skipped_before = np.concatenate([[0], np.cumsum(ends - starts)])
        self._kept_before = starts - self._skipped_before[:-1]  # number of kept positions before each range

    def to_positions(self, kept_indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Convert kept indices to data positions. The result has the same shape."""
        ranges_before = self._kept_before.searchsorted(kept_indices, "right")
        positions: npt.NDArray[np.int64] = kept_indices + self._skipped_before[ranges_before]
        return positions

    def kept_index(self, position: int) -> int:
        """Return the number of kept positions before a data position.

        If the position itself is kept, this number is its kept index.
        """
        # For a single number, bisect on a list takes a tenth of the time of numpy's searchsorted.
        ranges_before = bisect_left(self._merged, [position])
        skipped = int(self._skipped_before[ranges_before])
        if ranges_before:  # the position may be inside the last of these ranges
            skipped -= max(0, self._merged[ranges_before - 1][1] - position)
        return position - skipped
