"""CRC-32 of parts put together: what zlib calls crc32_combine, which Python's zlib does not offer."""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # of CRC-32, reflected


def joined(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of two stretches one after the other, from the CRC-32 of each.

    A CRC is linear: the first one's share of it is what so many zero bytes more would make of it.
    """
    power = 0
    while second_bytes:
        if second_bytes & 1:
            first = _times(_zeros(power), first)
        second_bytes >>= 1
        power += 1
    return first ^ second


@lru_cache
def _zeros(power: int) -> tuple[int, ...]:
    """What 2^power zero bytes do to a CRC: a matrix of bits, column by column."""
    if power:
        half = _zeros(power - 1)
        return tuple(_times(half, column) for column in half)
    columns = [1 << bit for bit in range(32)]
    for _ in range(8):
        columns = [column >> 1 ^ (_POLYNOMIAL if column & 1 else 0) for column in columns]
    return tuple(columns)


def _times(matrix: tuple[int, ...], vector: int) -> int:
    result = 0
    while vector:
        lowest = vector & -vector
        result ^= matrix[lowest.bit_length() - 1]
        vector ^= lowest
    return result
