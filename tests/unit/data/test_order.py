import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.order import Sampler, pattern, rank_positions
from megagpt.errors import UserError

SOURCES = st.lists(st.tuples(st.integers(9, 400), st.floats(0.3, 3)), min_size=1, max_size=4)


@given(tokens=st.integers(9, 3000), seed=st.integers(0, 2**64))
@settings(max_examples=100)
def test_an_epoch_holds_each_window_once_and_all_lie_inside(tokens, seed):
    order = Sampler([tokens], [1.0], 8, seed)
    n = order.samples_per_epoch
    assert n == max(1, tokens // 8 - 1)
    offsets = []
    for epoch in range(3):
        located = order.locate(range(epoch * n, (epoch + 1) * n))
        assert set(located.epoch) == {epoch}
        assert set(located.source) == {0}
        starts = np.sort(located.start)
        assert np.array_equal(starts, starts[0] + 8 * np.arange(n))
        assert 0 <= starts[0] < 8
        assert starts[-1] + 9 <= tokens
        offsets.append(starts[0])


def test_epochs_differ_in_order_and_in_their_cut():
    order = Sampler([100_000], [1.0], 64, 1)
    n = order.samples_per_epoch
    epochs = [order.locate(range(epoch * n, (epoch + 1) * n)).start for epoch in range(40)]
    offsets = [int(starts.min()) for starts in epochs]
    assert len(set(offsets)) > 20  # of 64: 30 expected
    ranks = [np.argsort(starts) for starts in epochs]
    assert np.mean(ranks[0] == ranks[1]) < 0.01  # 1 / 1561 expected


def test_seeds_differ_and_the_same_seed_does_not():
    one, same, other = (Sampler([10_000], [1.0], 16, seed).locate(range(100)).start for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert np.mean(one == other) < 0.1


@given(sources=SOURCES, seed=st.integers(0, 100), skipped=st.integers(0, 3000))
@settings(max_examples=25)
def test_each_source_gives_its_samples_once_an_epoch_wherever_one_begins(sources, seed, skipped):
    tokens, weights = zip(*sources, strict=True)
    order = Sampler(tokens, weights, 8, seed)
    blocks = -(-(skipped + 2000) // order.block)
    located = order.locate(range(blocks * order.block))
    for source, n in enumerate(order.samples):
        mine = located.source == source
        seen = list(zip(located.epoch[mine].tolist(), located.start[mine].tolist(), strict=True))
        assert len(seen) == len(set(seen))
        whole = len(seen) // n
        for epoch in range(whole):
            assert sum(e == epoch for e, _ in seen) == n
    late = order.locate(range(skipped, skipped + 50))
    assert np.array_equal(late.start, located.start[skipped : skipped + 50])


@given(weights=st.lists(st.floats(0.01, 1000), min_size=2, max_size=12))
def test_a_blocks_slots_are_within_a_thousandth_of_the_weights(weights):
    slots = pattern(weights)
    total = sum(slots)
    assert total >= 1024
    assert total & (total - 1) == 0
    for count, weight in zip(slots, weights, strict=True):
        assert abs(count / total - weight / math.fsum(weights)) < 1.001e-3 * weight / math.fsum(weights)


def test_every_prefix_of_a_blend_is_within_one_block_of_the_weights():
    weights = np.array([0.7, 0.2, 0.1])
    order = Sampler([5000, 9000, 300], weights, 8, 3)
    assert order.block == 4096
    counts = np.stack([order.locate(range(20_000)).source == source for source in range(3)]).cumsum(axis=1)
    prefix = np.arange(1, 20_001)
    away = np.abs(counts - weights[:, None] * prefix)
    # A thousandth of the prefix for the rounding of the slots, and at most the source's part of one block.
    assert np.all(away <= 1e-3 * weights[:, None] * prefix + (weights * order.block)[:, None] + 1)
    assert np.abs(counts[:, -1] / 20_000 - weights).max() < 2e-3
    first, second = counts[:, 4095], counts[:, 8191] - counts[:, 4095]
    assert first.tolist() == second.tolist() == list(pattern(weights))


def test_a_block_is_shuffled_anew_each_time():
    source = Sampler([5000, 5000], [0.5, 0.5], 8, 3).locate(range(2048)).source.reshape(2, 1024)
    agree = np.mean(source[0] == source[1])
    assert abs(agree - 0.5) < 0.07
    changes = np.mean(source[0, 1:] != source[0, :-1])
    assert abs(changes - 0.5) < 0.07


def test_a_far_position_is_found_at_once():
    order = Sampler([10**12, 10**9], [0.9, 0.1], 1024, 5)
    located = order.locate([10**15, 10**15 + 1])
    assert np.array_equal(located.start[1:], order.locate([10**15 + 1]).start)
    assert (located.start >= 0).all()
    assert (located.start + 1025 <= 10**12).all()


@given(
    position=st.integers(0, 10**9),
    layout=st.sampled_from(
        [(1, 24, 1), (1, 1, 24), (1, 4, 6), (2, 12, 1), (2, 3, 4), (3, 2, 4), (4, 1, 6), (4, 3, 2), (24, 1, 1)]
    ),
)
def test_ranks_and_micro_batches_share_the_same_global_batch(position, layout):
    data_parallel, micro_batch, accumulation = layout
    parts = [rank_positions(position, r, data_parallel, micro_batch, accumulation) for r in range(data_parallel)]
    assert all(part.shape == (accumulation, micro_batch) for part in parts)
    together = np.stack(parts, axis=1)  # [accumulation, rank, micro]
    assert np.array_equal(together.reshape(-1), np.arange(position, position + 24))


@pytest.mark.parametrize(
    ("tokens", "weights", "message"),
    [
        (
            [100, 8],
            [1, 1],
            "source 1 has 8 tokens, fewer than one sample (9)\n  data.train\n"
            "  do: prepare more text, or lower model.seq_len",
        ),
        ([100, 100], [1, 0], "the weight of source 1 is 0\n  data.train\n  do: give a number above 0"),
        ([100], [math.nan], "the weight of source 0 is nan\n  data.train\n  do: give a number above 0"),
        ([100], [math.inf], "the weight of source 0 is inf\n  data.train\n  do: give a number above 0"),
        (
            [100, 100],
            [1, 1e-12],
            "the weight of source 1 is too small a share of all (1.0e-12)\n  data.train\n"
            "  do: leave the source out, or give it at least a millionth of all",
        ),
    ],
)
def test_sources_that_cannot_be_ordered_are_named(tokens, weights, message):
    with pytest.raises(UserError) as error:
        Sampler(tokens, weights, 8, 1)
    assert str(error.value) == f"megagpt: {message}"
