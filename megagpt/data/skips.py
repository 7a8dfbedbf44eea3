"""Data positions that are left out by hand."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


class SkippedRanges:
    """Stretches of data positions that nobody trains on; each is (first, last), and both are left out.

    Every other sample keeps its position: what is left out moves nothing. The positions that are kept are numbered
    from 0.
    """

    def __init__(self, stretches: Iterable[tuple[int, int]]) -> None:
        merged: list[list[int]] = []
        for first, last in sorted(stretches):
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], last + 1)
            else:
                merged.append([first, last + 1])
        self._merged = merged
        firsts, ends = np.array(merged, np.int64).reshape(-1, 2).T
        self._left_out = np.concatenate([[0], np.cumsum(ends - firsts)])  # by the first so many stretches
        self._numbers = firsts - self._left_out[:-1]  # of the positions kept behind each stretch

    def positions(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The data positions of the kept ones with these numbers, in the same shape."""
        positions: npt.NDArray[np.int64] = numbers + self._left_out[self._numbers.searchsorted(numbers, "right")]
        return positions

    def number(self, position: int) -> int:
        """How many positions before this one are kept."""
        begun = bisect_left(self._merged, [position])  # of a list: in a tenth of the time that numpy takes for one
        inside = max(0, self._merged[begun - 1][1] - position) if begun else 0
        return position - int(self._left_out[begun]) + inside
