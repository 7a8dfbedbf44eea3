import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.sampler import Sampler, blend_slots, rank_positions
from megagpt.errors import UserError

SOURCES = st.lists(st.tuples(st.integers(9, 400), st.floats(0.3, 3)), min_size=1, max_size=4)


@given(tokens=st.integers(9, 3000), seed=st.integers(0, 2**64))
@settings(max_examples=100)
def test_an_epoch_has_each_sample_once_within_the_source(tokens, seed):
    sampler = Sampler([tokens], [1.0], 8, seed)
    n = sampler.samples_per_epoch
    assert n == max(1, tokens // 8 - 1)
    offsets = []
    for epoch in range(3):
        located = sampler.locate(range(epoch * n, (epoch + 1) * n))
        assert set(located.epoch) == {epoch}
        assert set(located.source) == {0}
        starts = np.sort(located.start)
        assert np.array_equal(starts, starts[0] + 8 * np.arange(n))
        assert 0 <= starts[0] < 8
        assert starts[-1] + 9 <= tokens
        offsets.append(starts[0])


def test_epochs_differ_in_order_and_offset():
    sampler = Sampler([100_000], [1.0], 64, 1)
    n = sampler.samples_per_epoch
    epochs = [sampler.locate(range(epoch * n, (epoch + 1) * n)).start for epoch in range(40)]
    offsets = [int(starts.min()) for starts in epochs]
    assert len(set(offsets)) > 20  # of 64: 30 expected
    ranks = [np.argsort(starts) for starts in epochs]
    assert np.mean(ranks[0] == ranks[1]) < 0.01  # 1 / 1561 expected


def test_the_order_depends_on_the_seed():
    one, same, other = (Sampler([10_000], [1.0], 16, seed).locate(range(100)).start for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert np.mean(one == other) < 0.1


@given(sources=SOURCES, seed=st.integers(0, 100), skipped=st.integers(0, 3000))
@settings(max_examples=25)
def test_each_source_gives_its_samples_once_per_epoch_from_any_position(sources, seed, skipped):
    tokens, weights = zip(*sources, strict=True)
    sampler = Sampler(tokens, weights, 8, seed)
    blocks = -(-(skipped + 2000) // sampler.block_size)
    located = sampler.locate(range(blocks * sampler.block_size))
    for source, n in enumerate(sampler.samples):
        mine = located.source == source
        seen = list(zip(located.epoch[mine].tolist(), located.start[mine].tolist(), strict=True))
        assert len(seen) == len(set(seen))
        whole = len(seen) // n
        for epoch in range(whole):
            assert sum(e == epoch for e, _ in seen) == n
    late = sampler.locate(range(skipped, skipped + 50))
    assert np.array_equal(late.start, located.start[skipped : skipped + 50])


@given(weights=st.lists(st.floats(0.01, 1000), min_size=2, max_size=12))
def test_slots_are_within_a_thousandth_of_the_weights(weights):
    slots = blend_slots(weights)
    total = sum(slots)
    assert total >= 1024
    assert total & (total - 1) == 0
    for count, weight in zip(slots, weights, strict=True):
        assert abs(count / total - weight / math.fsum(weights)) < 1.001e-3 * weight / math.fsum(weights)


def test_every_prefix_is_within_one_block_of_the_weights():
    weights = np.array([0.7, 0.2, 0.1])
    sampler = Sampler([5000, 9000, 300], weights, 8, 3)
    assert sampler.block_size == 4096
    counts = np.stack([sampler.locate(range(20_000)).source == source for source in range(3)]).cumsum(axis=1)
    prefix = np.arange(1, 20_001)
    away = np.abs(counts - weights[:, None] * prefix)
    # A thousandth of the prefix for the rounding of slots, and at most the source's fraction of one block.
    assert np.all(away <= 1e-3 * weights[:, None] * prefix + (weights * sampler.block_size)[:, None] + 1)
    assert np.abs(counts[:, -1] / 20_000 - weights).max() < 2e-3
    first, second = counts[:, 4095], counts[:, 8191] - counts[:, 4095]
    assert first.tolist() == second.tolist() == list(blend_slots(weights))


def test_each_block_is_shuffled_differently():
    source = Sampler([5000, 5000], [0.5, 0.5], 8, 3).locate(range(2048)).source.reshape(2, 1024)
    agree = np.mean(source[0] == source[1])
    assert abs(agree - 0.5) < 0.07
    changes = np.mean(source[0, 1:] != source[0, :-1])
    assert abs(changes - 0.5) < 0.07


def test_a_distant_position_is_located_directly():
    sampler = Sampler([10**12, 10**9], [0.9, 0.1], 1024, 5)
    located = sampler.locate([10**15, 10**15 + 1])
    assert np.array_equal(located.start[1:], sampler.locate([10**15 + 1]).start)
    assert (located.start >= 0).all()
    assert (located.start + 1025 <= 10**12).all()


@given(
    position=st.integers(0, 10**9),
    layout=st.sampled_from(
        [(1, 24, 1), (1, 1, 24), (1, 4, 6), (2, 12, 1), (2, 3, 4), (3, 2, 4), (4, 1, 6), (4, 3, 2), (24, 1, 1)]
    ),
)
def test_ranks_and_micro_batches_divide_the_global_batch(position, layout):
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
        ([100, 100], [1, 0], "the weight of source 1 is 0\n  data.train\n  do: give a finite number above 0"),
        ([100], [math.nan], "the weight of source 0 is nan\n  data.train\n  do: give a finite number above 0"),
        ([100], [math.inf], "the weight of source 0 is inf\n  data.train\n  do: give a finite number above 0"),
        (
            [100, 100],
            [1, 1e-12],
            "the weight of source 1 is too small a fraction of the total (1.0e-12)\n  data.train\n"
            "  do: remove the source, or give it at least a millionth of the total weight",
        ),
    ],
)
def test_unusable_sources_are_rejected(tokens, weights, message):
    with pytest.raises(UserError) as error:
        Sampler(tokens, weights, 8, 1)
    assert str(error.value) == f"megagpt: {message}"
