import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config.recipe import Source
from megagpt.data import blend
from megagpt.data.sampler import Sampler
from megagpt.errors import UserError

SOURCES = (
    Source(path="corpora/web", weight=0.7),
    Source(path="corpora/books", weight=0.2, max_epochs=4.0),
    Source(path="x", weight=0.1, max_epochs=1.5),
)
WEIGHTS = [source.weight for source in SOURCES]


@given(
    weights=st.lists(st.floats(0.05, 1), min_size=2, max_size=5),
    samples=st.integers(1, 20_000),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=30)
def test_usage_of_each_source_is_right_to_within_one_block(weights, samples, seed):
    sampler = Sampler([9000] * len(weights), weights, 8, seed)
    sources = [Source(path=str(number), weight=weight) for number, weight in enumerate(weights)]
    counts = np.bincount(sampler.locate(np.arange(samples)).source, minlength=len(weights))
    for row, weight, count in zip(blend.source_usage(sampler, sources, samples), weights, counts, strict=True):
        assert abs(row.samples - count) <= min(row.fraction, 1 - row.fraction) * sampler.block_size + 1
        assert row.fraction == pytest.approx(weight / math.fsum(weights), rel=1.001e-3)
        # 9,000 tokens hold 1,125 samples of 8; one fewer leaves room for the offset.
        assert row.epochs == row.samples / 1124


def test_the_table_has_one_line_per_source():
    sampler = Sampler([7_000_000, 200_000, 33], WEIGHTS, 16, 1)
    assert blend.format_table(blend.source_usage(sampler, SOURCES, 100_000)) == [
        "source            tokens  fraction  samples     epochs",
        "corpora/web    7,000,000    70.00%   69,995       0.16",
        "corpora/books    200,000    20.00%   19,995       1.60",
        "x                     33    10.01%   10,010  10,010.00",
    ]


def test_all_sources_that_exceed_max_epochs_are_reported():
    sampler = Sampler([7_000_000, 40_000, 4_000], WEIGHTS, 16, 1)
    rows = blend.source_usage(sampler, SOURCES, 64_000)
    with pytest.raises(UserError) as error:
        blend.check_max_epochs(rows, SOURCES, 64_000, 64, lambda key: f"r.yaml:{key[11]}")
    assert str(error.value) == (
        "megagpt: corpora/books would be read 5.12 times (12,797 samples), but its max_epochs is 4\n"
        "  r.yaml:1  data.train.1.max_epochs\n"
        "  do: train for at most 781 updates, give the source a smaller weight, or raise max_epochs\n"
        "megagpt: x would be read 25.73 times (6,406 samples), but its max_epochs is 1.5\n"
        "  r.yaml:2  data.train.2.max_epochs\n"
        "  do: train for at most 58 updates, give the source a smaller weight, or raise max_epochs"
    )
    blend.check_max_epochs(blend.source_usage(sampler, SOURCES, 58 * 64), SOURCES, 58 * 64, 64, lambda key: "")
    with pytest.raises(UserError):
        blend.check_max_epochs(blend.source_usage(sampler, SOURCES, 59 * 64), SOURCES, 59 * 64, 64, lambda key: "")
