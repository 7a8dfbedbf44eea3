"""Which rank holds which fragment of each matrix, and which reassembles it, on any number of ranks."""

from __future__ import annotations

import types
from collections import defaultdict

import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt.engine.optim.muon_all_to_all import Matrix, assign_owners
from megagpt.engine.state.flat_buffers import fragments_of_buffer, fragments_of_parameters

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=12)
RANKS = st.integers(1, 7)


def _matrices(sizes):
    return [Matrix(torch.Size((size, 1))) for size in sizes]


def _load(sizes, owners, ranks):
    return [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(ranks)]


def _check_complete(sizes, fragments, length):
    """Check that every element of every matrix is on exactly one rank, at an offset of its own."""
    used = set()
    elements = defaultdict(set)
    for fragment in fragments:
        offsets = {(fragment.rank, fragment.offset + i) for i in range(fragment.numel)}
        assert not offsets & used
        assert all(offset < length for _, offset in offsets)
        used |= offsets
        found = set(range(fragment.start, fragment.start + fragment.numel))
        assert not found & elements[fragment.matrix]
        elements[fragment.matrix] |= found
    assert all(elements[number] == set(range(size)) for number, size in enumerate(sizes))


@given(SIZES, RANKS, st.integers(0, 5))
def test_ranges_of_equal_length_are_complete_and_their_owners_have_similar_loads(sizes, ranks, padding):
    length = -(-sum(sizes) // ranks) + padding
    parameters = [torch.empty(size, 1) for size in sizes]
    fragments = fragments_of_buffer(parameters, [sum(sizes[:number]) for number in range(len(sizes))], length)
    _check_complete(sizes, fragments, length)
    owners = assign_owners(_matrices(sizes), fragments, ranks)
    holders = {(fragment.matrix, fragment.rank) for fragment in fragments}
    assert all((number, owner) in holders for number, owner in enumerate(owners))
    assert max(_load(sizes, owners, ranks)) <= length + 2 * max(sizes)


@given(SIZES, RANKS)
def test_if_every_rank_has_a_fragment_of_every_matrix_all_have_similar_loads(sizes, ranks):
    parameters = [
        types.SimpleNamespace(ds_numel=size, ds_tensor=types.SimpleNamespace(ds_numel=-(-size // ranks)))
        for size in (size * ranks for size in sizes)
    ]
    whole = [size * ranks for size in sizes]
    fragments = fragments_of_parameters(parameters)
    _check_complete(whole, fragments, sum(sizes))
    load = _load(whole, assign_owners(_matrices(whole), fragments, ranks), ranks)
    assert max(load) - min(load) <= max(whole)


@given(SIZES, RANKS)
def test_padding_is_not_part_of_a_matrix(sizes, ranks):
    parameters = [
        types.SimpleNamespace(ds_numel=size, ds_tensor=types.SimpleNamespace(ds_numel=-(-size // ranks)))
        for size in sizes
    ]
    _check_complete(sizes, fragments_of_parameters(parameters), sum(-(-size // ranks) for size in sizes))
