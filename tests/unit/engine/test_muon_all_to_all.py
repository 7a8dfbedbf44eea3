"""Which rank holds what of each matrix, and which makes it whole, for any matrices on any number of ranks."""

from __future__ import annotations

import types
from collections import defaultdict

import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt.engine.optim.muon_all_to_all import Matrix, owners_of
from megagpt.engine.state.flat_buffers import _partitioned, _stretched

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=12)
RANKS = st.integers(1, 7)


def _matrices(sizes):
    return [Matrix(torch.Size((size, 1))) for size in sizes]


def _load(sizes, owners, ranks):
    return [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(ranks)]


def _whole(sizes, fragments, length):
    """Every element of every matrix lies on one rank, at a place of its own."""
    places = defaultdict(set)
    for one in fragments:
        taken = {(one.rank, one.place + i) for i in range(one.numel)}
        assert not taken & places["all"]
        assert all(place < length for _, place in taken)
        places["all"] |= taken
        elements = set(range(one.start, one.start + one.numel))
        assert not elements & places[one.matrix]
        places[one.matrix] |= elements
    assert all(places[number] == set(range(size)) for number, size in enumerate(sizes))


@given(SIZES, RANKS, st.integers(0, 5))
def test_stretches_of_equal_length_hold_all_and_most_matrices_stay_where_they_are(sizes, ranks, filled_up):
    length = -(-sum(sizes) // ranks) + filled_up
    parameters = [torch.empty(size, 1) for size in sizes]
    fragments = _stretched(parameters, [sum(sizes[:number]) for number in range(len(sizes))], length)
    _whole(sizes, fragments, length)
    owners = owners_of(_matrices(sizes), fragments, ranks)
    holders = {(one.matrix, one.rank) for one in fragments}
    assert all((number, owner) in holders for number, owner in enumerate(owners))
    assert max(_load(sizes, owners, ranks)) <= length + 2 * max(sizes)


@given(SIZES, RANKS)
def test_where_every_rank_has_a_part_of_every_matrix_all_have_as_much_to_do(sizes, ranks):
    parameters = [
        types.SimpleNamespace(ds_numel=size, ds_tensor=types.SimpleNamespace(ds_numel=-(-size // ranks)))
        for size in (size * ranks for size in sizes)
    ]
    whole = [size * ranks for size in sizes]
    fragments = _partitioned(parameters)
    _whole(whole, fragments, sum(sizes))
    load = _load(whole, owners_of(_matrices(whole), fragments, ranks), ranks)
    assert max(load) - min(load) <= max(whole)


@given(SIZES, RANKS)
def test_a_part_that_is_filled_up_is_no_part_of_a_matrix(sizes, ranks):
    parameters = [
        types.SimpleNamespace(ds_numel=size, ds_tensor=types.SimpleNamespace(ds_numel=-(-size // ranks)))
        for size in sizes
    ]
    _whole(sizes, _partitioned(parameters), sum(-(-size // ranks) for size in sizes))
