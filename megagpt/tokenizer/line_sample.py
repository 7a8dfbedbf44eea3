"""Random sample of texts with a bounded size. The sample does not depend on the order or grouping of the texts."""

from __future__ import annotations

import hashlib
import heapq
import struct
from collections.abc import Iterator

_MAX_DRAW = 1 << 64  # larger than every hash
TextPosition = tuple[int, int]
"""Unique position of a text, for example the number of a chunk and of a line in it. Sampled texts are ordered by it."""


class BoundedSample:
    """Random sample of at most `limit` bytes from all texts that are added.

    Each text is assigned a number, which is the hash of its position. The sample consists of the texts with the
    smallest numbers, up to the first text that no longer fits. Samples of two parts of the texts can therefore be
    merged into the sample of both parts.

    Only texts with numbers below `threshold` can be in the sample. The threshold decreases as texts are added. Other
    processes need not send texts with larger numbers.
    """

    def __init__(self, limit: int, threshold: int = _MAX_DRAW) -> None:
        """Create an empty sample.

        Args:
            limit: The maximum total size of the sampled texts, in bytes of UTF-8.
            threshold: Texts with this number or a larger one are ignored.
        """
        self.limit, self.threshold = limit, threshold
        self._size = 0
        # The heap contains negated numbers, so that the entry with the largest number comes first.
        self._heap: list[tuple[int, TextPosition, bytes]] = []

    def add(self, position: TextPosition, text: str) -> None:
        """Add a text with its unique position. The text must not contain lone surrogates."""
        digest = hashlib.blake2b(struct.pack("<qq", *position), digest_size=8).digest()
        number = int.from_bytes(digest, "little")
        if number < self.threshold:
            self._push(number, position, text.encode())

    def merge(self, other: BoundedSample) -> None:
        """Add the texts of another sample. They keep their numbers."""
        self.threshold = min(self.threshold, other.threshold)
        for negated, position, text in other._heap:
            if -negated < self.threshold:
                self._push(-negated, position, text)
        self._shrink()

    def texts(self) -> list[str]:
        """Return the sampled texts in the order of their positions."""
        return [text.decode() for _, _, text in sorted(self._heap, key=lambda entry: entry[1])]

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts())

    def _push(self, number: int, position: TextPosition, text: bytes) -> None:
        heapq.heappush(self._heap, (-number, position, text))
        self._size += len(text)
        self._shrink()

    def _shrink(self) -> None:
        while self._heap and (self._size > self.limit or -self._heap[0][0] >= self.threshold):
            negated, _, text = heapq.heappop(self._heap)
            self._size -= len(text)
            self.threshold = min(self.threshold, -negated)
