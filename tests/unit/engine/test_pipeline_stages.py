"""The split of layers into pipeline stages."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from megagpt.config.recipe import ModelSection
from megagpt.model import flops
from megagpt.model.gpt import GPT

COSTS = st.lists(st.integers(0, 20).map(float), min_size=1, max_size=9)


def loads(costs, cuts):
    return sorted((sum(costs[start:stop]) for start, stop in pairwise(cuts)), reverse=True)


@given(COSTS, st.integers(1, 5))
def test_no_other_split_has_a_cheaper_most_expensive_stage(costs, stages):
    stages = min(stages, len(costs))
    got = flops.boundaries(costs, stages)
    every = [[0, *cuts, len(costs)] for cuts in combinations(range(1, len(costs)), stages - 1)]
    assert got in every
    assert loads(costs, got) == min(loads(costs, cuts) for cuts in every)


def test_the_stage_of_an_expensive_head_has_fewer_blocks():
    section = ModelSection(n_layer=4, n_head=2, d_model=32, vocab_size=2000, seq_len=16)
    assert flops.boundaries(flops.layer_costs(section), 2) == [0, 6, 8]  # embedding, positions, 4 blocks | norm, head


def test_blocks_are_split_evenly_if_the_vocabulary_is_small():
    section = ModelSection(n_layer=8, n_head=2, d_model=64, vocab_size=64, seq_len=16)
    assert flops.boundaries(flops.layer_costs(section), 4) == [0, 4, 6, 8, 12]


def test_costs_add_up_to_the_flops_and_one_per_parameter():
    for tied in (True, False):
        section = ModelSection(
            n_layer=3, n_head=4, n_kv_head=2, d_model=32, vocab_size=96, seq_len=16, activation="swiglu",
            norm="rmsnorm", position="rope", tie_embeddings=tied,
        )  # fmt: skip
        costs = flops.layer_costs(section)
        assert len(costs) == len(GPT(section).layers)
        vectors = section.d_model * (2 * section.n_layer + 1)  # norm weights, of which the blocks' are not counted
        expected = flops.flops_per_token(section) + flops.parameters(section) - vectors + section.d_model
        assert sum(costs) == expected
