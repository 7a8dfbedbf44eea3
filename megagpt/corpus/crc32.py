"""Combines CRC-32 checksums of consecutive byte ranges, like zlib's crc32_combine.

Python's zlib module does not expose that function.
"""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # the polynomial of CRC-32, bit-reflected


def combine_crc32(first: int, second: int, second_bytes: int) -> int:
    """Compute the CRC-32 of two consecutive byte ranges from the CRC-32 of each.

    CRC-32 is linear over GF(2). The first checksum is advanced by as many zero bytes as the second range has bytes, and
    then XORed with the second checksum.

    Args:
        first: CRC-32 of the first range.
        second: CRC-32 of the second range.
        second_bytes: length of the second range in bytes.

    Returns:
        CRC-32 of both ranges together.
    """
    power = 0
    while second_bytes:
        if second_bytes & 1:
            first = _multiply(_zero_bytes_matrix(power), first)
        second_bytes >>= 1
        power += 1
    return first ^ second


@lru_cache
def _zero_bytes_matrix(power: int) -> tuple[int, ...]:
    """Return the columns of the 32 × 32 bit matrix that advances a CRC by 2^power zero bytes."""
    if power:
        half = _zero_bytes_matrix(power - 1)
        return tuple(_multiply(half, column) for column in half)
    columns = [1 << bit for bit in range(32)]
    for _ in range(8):
        columns = [column >> 1 ^ (_POLYNOMIAL if column & 1 else 0) for column in columns]
    return tuple(columns)


def _multiply(matrix: tuple[int, ...], vector: int) -> int:
    """Multiply a bit matrix, given as its columns, by a vector over GF(2)."""
    result = 0
    while vector:
        lowest = vector & -vector
        result ^= matrix[lowest.bit_length() - 1]
        vector ^= lowest
    return result
