"""A bounded sample of many texts that does not depend on the order or the parts in which they come."""

from __future__ import annotations

import hashlib
import heapq
import struct
from collections.abc import Iterator

_ALL = 1 << 64  # above every number that is drawn
Place = tuple[int, int]
"""Where a text stands: two numbers of its own, by which texts are ordered."""


class BoundedSample:
    """At most `limit` bytes of texts, spread over all that are offered.

    Each text draws a number from the hash of its place; the smallest stay, up to the first text that does not fit.
    So two samples of two halves make the sample of the whole. Only numbers below `below` can stay: it sinks as texts
    come, and tells whoever draws elsewhere what need not be sent.
    """

    def __init__(self, limit: int, below: int = _ALL) -> None:
        self.limit, self.below = limit, below
        self._size = 0
        self._kept: list[tuple[int, Place, bytes]] = []  # a heap, the largest number first, which is why it is negated

    def offer(self, place: Place, text: str) -> None:
        """Draw for a text, which holds no lone surrogates."""
        number = int.from_bytes(hashlib.blake2b(struct.pack("<qq", *place), digest_size=8).digest(), "little")
        if number < self.below:
            self._keep(number, place, text.encode())

    def add(self, other: BoundedSample) -> None:
        """Take another sample's texts in, too."""
        self.below = min(self.below, other.below)
        for number, place, text in other._kept:
            if -number < self.below:
                self._keep(-number, place, text)
        self._shrink()

    def texts(self) -> list[str]:
        """The texts in the order of their places."""
        return [text.decode() for _, _, text in sorted(self._kept, key=lambda kept: kept[1])]

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts())

    def _keep(self, number: int, place: Place, text: bytes) -> None:
        heapq.heappush(self._kept, (-number, place, text))
        self._size += len(text)
        self._shrink()

    def _shrink(self) -> None:
        while self._kept and (self._size > self.limit or -self._kept[0][0] >= self.below):
            number, _, text = heapq.heappop(self._kept)
            self._size -= len(text)
            self.below = min(self.below, -number)
