"""Keyed pseudorandom permutations of the integers from 0 to n - 1.

Any entry can be computed in constant time, without storing the permutation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
# Number of rounds, each of which changes both halves. With only two rounds, the differences between the images of
# neighboring numbers are visibly non-uniform.
_ROUNDS = 4
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # increment of splitmix64, which is 2^64 / golden ratio, rounded to an odd number


def as_uint64(values: Sequence[int] | npt.NDArray[np.integer]) -> UInt64Array:
    """Return the values as a uint64 array `[count]`.

    Arrays are used even for single values because numpy warns about overflow of scalars, but not of arrays.
    """
    array: UInt64Array = np.asarray(values, dtype=np.uint64)
    return array.reshape(-1)


def mix_bits(values: UInt64Array) -> UInt64Array:
    """Apply the finalizer of splitmix64 (Steele, Lea and Flood, 2014), which spreads every bit over all 64 bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64Array = values ^ (values >> np.uint64(31))
    return mixed


def derive_keys(seed: int, *parts: int | UInt64Array) -> UInt64Array:
    """Derive 64-bit keys from a seed and further numbers.

    Args:
        seed: any integer, which is reduced modulo 2^64.
        parts: integers or arrays, which are broadcast against each other.

    Returns:
        The keys `[count]`, where `count` is the size after broadcasting.
    """
    key = mix_bits(as_uint64([seed % 2**64]))
    for part in parts:
        value = as_uint64([part]) if isinstance(part, int) else part
        key = mix_bits(key + value * np.uint64(_GOLDEN_GAMMA) + np.uint64(_GOLDEN_GAMMA))
    return key


def radices(n: int) -> tuple[int, int]:
    """Return the two radices for the permutation of n numbers.

    The radices are a = ceil(sqrt(n)) and b = ceil(n / a). They satisfy n <= a·b < n + a.
    """
    a = math.isqrt(n - 1) + 1
    return a, -(-n // a)


def permute(index: UInt64Array, n: UInt64Array, a: UInt64Array, b: UInt64Array, key: UInt64Array) -> UInt64Array:
    """Return the images of indices under keyed permutations. All arrays are broadcast to `[count]`.

    The permutation is a Feistel network over the mixed radix a·b. A result of n or more is mapped again until it is
    less than n (cycle walking, Black and Rogaway 2002). Fewer than one in sqrt(n) results need this.

    Args:
        index: indices from 0 to n - 1.
        n: size of each permutation.
        a: first radix of n, see `radices`.
        b: second radix of n.
        key: key of each permutation, see `derive_keys`.

    Returns:
        The images of the indices `[count]`.
    """
    index, n, a, b, key = np.broadcast_arrays(index, n, a, b, key)
    result = _feistel(index, a, b, key)
    while (outside := np.flatnonzero(result >= n)).size:
        result[outside] = _feistel(result[outside], a[outside], b[outside], key[outside])
    return result


def fast_divmod(values: UInt64Array, divisors: UInt64Array) -> tuple[UInt64Array, UInt64Array]:
    """Return quotients and remainders. For a single divisor, this is several times faster than np.divmod."""
    quotient = values // divisors
    return quotient, values - quotient * divisors


def _feistel(index: UInt64Array, a: UInt64Array, b: UInt64Array, key: UInt64Array) -> UInt64Array:
    left, right = fast_divmod(index, b)
    for number in range(_ROUNDS):
        round_key = key + np.uint64((2 * number + 1) * _GOLDEN_GAMMA % 2**64)
        # The mixed bits are shifted right by one so that the sums do not overflow 64 bits.
        _, left = fast_divmod(left + (mix_bits(round_key ^ right) >> np.uint64(1)), a)
        _, right = fast_divmod(right + (mix_bits(round_key + np.uint64(_GOLDEN_GAMMA) ^ left) >> np.uint64(1)), b)
    return left * b + right
