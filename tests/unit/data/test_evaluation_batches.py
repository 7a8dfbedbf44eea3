import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagpt.data.evaluation_batches import EvaluationBatches, combine_losses
from megagpt.errors import UserError

ANY_FIXTURE = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def evaluation(corpus, **changes):
    return EvaluationBatches(corpus, **{"seq_len": 8, "vocab_size": 50_000, "micro_batch": 3, **changes})


def pairs(batches):
    """Return (input, label) for each label that is not ignored."""
    found = []
    for batch in batches:
        counts = batch.labels != -100
        found += zip(batch.input_ids[counts].tolist(), batch.labels[counts].tolist(), strict=True)
    return found


def in_order(ranks):
    """Return the batches of all ranks in corpus order."""
    return [batch for step in zip(*(rank.batches() for rank in ranks), strict=True) for batch in step]


@given(tokens=st.integers(1, 200), data_parallel=st.integers(1, 4), micro_batch=st.integers(1, 5))
@ANY_FIXTURE
def test_every_token_is_a_label_once_after_the_token_before_it(make_corpus, tokens, data_parallel, micro_batch):
    ids = list(range(100, 100 + tokens))
    corpus = make_corpus([ids], eod=5)
    layout = {"data_parallel": data_parallel, "micro_batch": micro_batch}
    ranks = [evaluation(corpus, rank=rank, **layout) for rank in range(data_parallel)]
    assert pairs(in_order(ranks)) == list(zip([5, *ids], ids, strict=False))
    windows = -(-tokens // 8)
    for rank in ranks:
        batches = list(rank.batches())
        assert len(batches) == len(rank) == -(-windows // (micro_batch * data_parallel))
        assert all(part.shape == (micro_batch, 8) and part.dtype == torch.int64 for b in batches for part in b)
        assert all(part.min() >= 0 for part, _ in batches)
        assert (rank.tokens, rank.text_bytes, rank.is_complete) == (tokens, 3 * tokens, True)


def test_a_window_holds_its_tokens_and_the_one_before(make_corpus):
    batch = next(evaluation(make_corpus([range(20)], eod=9)).batches())
    assert batch.input_ids.tolist() == [
        [9, 0, 1, 2, 3, 4, 5, 6],
        [7, 8, 9, 10, 11, 12, 13, 14],
        [15, 16, 17, 18, 0, 0, 0, 0],
    ]
    assert batch.labels.tolist() == [[*range(8)], [*range(8, 16)], [16, 17, 18, 19, -100, -100, -100, -100]]


def test_the_first_token_is_no_label_without_a_sidecar(make_corpus):
    ids = list(range(100, 120))
    part = evaluation(make_corpus([ids], verified=False))
    assert pairs(part.batches()) == list(itertools.pairwise(ids))
    assert (part.tokens, part.text_bytes) == (19, None)


@pytest.mark.parametrize("samples", [1, 3, 10, 25, 26, 1000])
@pytest.mark.parametrize("data_parallel", [1, 2])
def test_limited_samples_are_windows_spread_evenly(make_corpus, samples, data_parallel):
    ids = list(range(200, 403))  # 26 windows, the last of 3 tokens
    corpus = make_corpus([ids])
    ranks = [evaluation(corpus, samples=samples, data_parallel=data_parallel, rank=r) for r in range(data_parallel)]
    labels = [label for _, label in pairs(in_order(ranks))]
    windows = sorted({(label - 200) // 8 for label in labels})
    count = min(samples, 26)
    assert windows == [n * 26 // count for n in range(count)]
    assert labels == [label for label in ids if (label - 200) // 8 in windows]
    for rank in ranks:
        assert rank.tokens == len(labels)
        assert rank.text_bytes == pytest.approx(3 * len(labels))
        assert rank.is_complete == (samples >= 26)


def test_corpora_that_cannot_be_evaluated_are_rejected(make_corpus):
    empty = make_corpus([[], []])
    with pytest.raises(UserError) as error:
        evaluation(empty)
    assert str(error.value) == (
        f"megagpt: the corpus has no tokens to evaluate on\n  {empty.prefix}\n  do: prepare more text"
    )
    with pytest.raises(UserError, match="vocabulary of 100, but the model has only 99"):
        evaluation(make_corpus([range(50)], vocab_size=100), vocab_size=99)


def test_the_loss_of_several_corpora_is_that_of_all_their_tokens(make_corpus):
    parts = [evaluation(make_corpus([range(10)])), evaluation(make_corpus([range(30)]))]
    loss, bits = combine_losses([(parts[0], 2.0), (parts[1], 4.0)])
    assert loss == pytest.approx((10 * 2 + 30 * 4) / 40)
    assert bits == pytest.approx((10 * 2 + 30 * 4) / (3 * 40) / math.log(2))
    alone = evaluation(make_corpus([range(7)]))
    assert combine_losses([(alone, 2.34567)]) == (2.34567, alone.bits_per_byte(2.34567))
    assert combine_losses([(parts[0], 2.0), (evaluation(make_corpus([range(30)], verified=False)), 4.0)])[1] is None
