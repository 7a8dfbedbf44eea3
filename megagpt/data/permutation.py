"""A keyed permutation of 0 … n - 1 that is computed, not stored: any entry in constant time and no memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.uint64]
_ROUNDS = 4  # each changes both halves; with two, neighbours' differences are still visibly uneven
_ODD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: the step of splitmix64


def as_numbers(values: Sequence[int] | npt.NDArray[np.integer]) -> Numbers:
    """Values as a uint64 array `[count]` (numpy warns when a scalar wraps round, not an array)."""
    numbers: Numbers = np.asarray(values, dtype=np.uint64)
    return numbers.reshape(-1)


def mix(numbers: Numbers) -> Numbers:
    """Spread every bit of each number over all 64: the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Numbers = numbers ^ (numbers >> np.uint64(31))
    return mixed


def keys(seed: int, *parts: int | Numbers) -> Numbers:
    """One 64-bit key for each combination of `seed` and `parts` (numbers or arrays that broadcast)."""
    key = mix(as_numbers([seed % 2**64]))
    for part in parts:
        value = as_numbers([part]) if isinstance(part, int) else part
        key = mix(key + value * np.uint64(_ODD) + np.uint64(_ODD))
    return key


def sides(n: int) -> tuple[int, int]:
    """The two radices of the permutation of n: a = ceil(sqrt(n)), b = ceil(n / a), so a·b >= n with few to spare."""
    a = math.isqrt(n - 1) + 1
    return a, -(-n // a)


def permute(index: Numbers, n: Numbers, a: Numbers, b: Numbers, key: Numbers) -> Numbers:
    """Where the permutation of 0 … n - 1 with this key sends `index`; all arrays broadcast to `[count]`.

    A Feistel network over the mixed radix a·b; what lands at n or above is sent on until it lies below
    (cycle walking, Black and Rogaway 2002), which happens to fewer than one in sqrt(n).
    """
    index, n, a, b, key = np.broadcast_arrays(index, n, a, b, key)
    result = _rounds(index, a, b, key)
    while (outside := np.flatnonzero(result >= n)).size:
        result[outside] = _rounds(result[outside], a[outside], b[outside], key[outside])
    return result


def divided(numbers: Numbers, by: Numbers) -> tuple[Numbers, Numbers]:
    """Quotient and remainder. Where `by` is one number for all, numpy's division is several times as fast as divmod."""
    quotient = numbers // by
    return quotient, numbers - quotient * by


def _rounds(index: Numbers, a: Numbers, b: Numbers, key: Numbers) -> Numbers:
    left, right = divided(index, b)
    for number in range(_ROUNDS):
        step = key + np.uint64((2 * number + 1) * _ODD % 2**64)
        _, left = divided(left + (mix(step ^ right) >> np.uint64(1)), a)  # halved, so that the sum stays below 2^64
        _, right = divided(right + (mix(step + np.uint64(_ODD) ^ left) >> np.uint64(1)), b)
    return left * b + right
