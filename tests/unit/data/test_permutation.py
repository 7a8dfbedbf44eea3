import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megagpt.data.permutation import as_uint64, derive_keys, permute, radices

# Chi-square over its degrees of freedom has mean 1 and standard deviation sqrt(2 / df); 3.3 of those is one in 1,000.


def permutation(n, key, indices=None):
    a, b = radices(n)
    index = np.arange(n) if indices is None else np.asarray(indices)
    return permute(as_uint64(index), as_uint64([n]), as_uint64([a]), as_uint64([b]), key)


@given(n=st.integers(1, 5000), seed=st.integers(-(2**70), 2**70))
@example(n=1, seed=0)
@example(n=4096, seed=0)
@example(n=4097, seed=0)
@settings(max_examples=200)
def test_every_size_is_permuted(n, seed):
    assert np.array_equal(np.sort(permutation(n, derive_keys(seed))), np.arange(n))


@pytest.mark.parametrize("n", [65_537, 1_000_003])
def test_large_sizes_are_permuted(n):
    assert np.array_equal(np.sort(permutation(n, derive_keys(7))), np.arange(n))


@given(n=st.integers(1, 2**62), data=st.data())
def test_images_stay_below_n_for_any_size(n, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True))
    values = permutation(n, derive_keys(1), indices)
    assert values.max() < n
    assert len(set(values.tolist())) == len(indices)


@given(n=st.integers(1, 2**62))
def test_the_radices_hold_n_with_little_excess(n):
    a, b = radices(n)
    assert n <= a * b < n + a  # so fewer than one in sqrt(n) is mapped again


def chi_square(counts):
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("n", [16, 37, 100])
def test_each_index_is_mapped_uniformly_over_many_keys(n):
    many = derive_keys(5, as_uint64(np.arange(3000)))
    a, b = (as_uint64([radix]) for radix in radices(n))
    counts = np.zeros((n, n))
    for index in range(n):
        counts[index] = np.bincount(permute(as_uint64([index]), as_uint64([n]), a, b, many).astype(int), minlength=n)
    degrees = (n - 1) ** 2
    assert abs(chi_square(counts) / degrees - 1) < 3.3 * (2 / degrees) ** 0.5


def test_neighbors_are_mapped_independently():
    n = 300
    steps = np.zeros(n)
    for key in derive_keys(7, as_uint64(np.arange(2000))):
        values = permutation(n, as_uint64([key])).astype(np.int64)
        steps += np.bincount((values[1:] - values[:-1]) % n, minlength=n)
    assert steps[0] == 0
    assert abs(chi_square(steps[1:]) / 298 - 1) < 3.3 * (2 / 298) ** 0.5


def test_neighbors_are_mapped_independently_in_a_large_permutation():
    n = 1_000_003
    values = permutation(n, derive_keys(3)).astype(np.float64)
    steps = np.histogram((values[1:] - values[:-1]) % n, bins=1000, range=(0, n))[0]
    assert abs(chi_square(steps) / 999 - 1) < 3.3 * (2 / 999) ** 0.5
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 3.3 / n**0.5


def test_keys_depend_on_seed_and_every_part():
    made = [int(derive_keys(seed, one, other)[0]) for seed in range(4) for one in range(4) for other in range(4)]
    assert len(set(made)) == 64
    assert derive_keys(1, as_uint64([5, 6]), 7)[1] == derive_keys(1, 6, 7)[0]
    assert derive_keys(-1)[0] == derive_keys(2**64 - 1)[0]
