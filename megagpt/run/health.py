"""Failures and bad numbers: how many are borne, and what is done about them, the same on every rank."""

from __future__ import annotations

MOST_FAILED_SAVES = 4  # in a row


class Row:
    """Counts failures in a row."""

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0

    def add(self) -> bool:
        """Note one more; whether it is one too many."""
        self._count += 1
        return self._count >= self._most

    def end(self) -> None:
        """It went well: the row is over."""
        self._count = 0
