import errno
import itertools
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagpt.corpus.reader import CorpusChanged, CorpusReader, corpus_file
from megagpt.data.evaluation_batches import EvaluationBatches
from megagpt.data.loader import Loader, _are_cached
from megagpt.errors import UserError

ANY_FIXTURE = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def corpora(make_corpus):
    """Return two corpora whose ids reveal their position: they count up from 0 and from 20,000."""
    return [make_corpus([range(0, 3000), range(3000, 5000)]), make_corpus([range(20_000, 21_500)])]


def loader(corpora, weights=(1.0, 1.0), **changes):
    options = {"seq_len": 16, "seed": 7, "vocab_size": 50_000, "micro_batch": 4, **changes}
    sources = [(corpus.prefix, weight) for corpus, weight in zip(corpora, weights, strict=False)]
    return Loader(sources, **options)


def samples(batches):
    """Return the rows of all micro-batches, each as the range of tokens that it came from."""
    for batch in batches:
        assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    return [[int(i[0]), *j.tolist()] for batch in batches for i, j in zip(*batch, strict=True)]


def expected_samples(data, corpora, positions):
    locations = data.sampler.locate(positions)
    starts = zip(locations.source, locations.start, strict=True)
    return [corpora[source].tokens[start : start + 17].tolist() for source, start in starts]


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_holds_the_samples_that_the_sampler_selects(corpora, count):
    data = loader(corpora[:count], accumulation=3)
    batches = data.batches(96)
    assert len(batches) == 3
    for batch in batches:
        for part in batch:
            assert (part.dtype, part.shape) == (torch.int64, (4, 16))
    assert samples(batches) == expected_samples(data, corpora, range(96, 96 + 12))


def test_inputs_and_labels_share_memory(corpora):
    batch = loader(corpora[:1]).batches(0)[0]
    assert batch.labels.data_ptr() == batch.input_ids.data_ptr() + 8
    assert batch.input_ids.stride() == batch.labels.stride() == (17, 1)


@pytest.mark.parametrize(("cached", "prefetched"), [(0, 12), (1, 12), (None, 0)])
def test_coming_samples_are_prefetched_unless_all_are_cached(corpora, monkeypatch, cached, prefetched):
    """The filesystem reports that this many samples (None: all) are cached, then that it would block."""
    probes, advised = itertools.count(), []

    def preadv(fd, buffers, offset, flags):
        assert flags == os.RWF_NOWAIT
        if next(probes) == cached:
            raise BlockingIOError
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: advised.append(given))
    data = loader(corpora, accumulation=3)
    expected = expected_samples(data, corpora, range(12, 24))
    data.batches(0)
    assert len(advised) == prefetched
    ids = [np.frombuffer(os.pread(fd, size, offset), "<u2") for fd, offset, size, _ in advised]
    assert [sample.tolist() for sample in ids] == expected[:prefetched]
    assert {advice for *_, advice in advised} <= {os.POSIX_FADV_WILLNEED}


def test_page_cache_state_is_read_from_the_filesystem(make_corpus):
    corpus = make_corpus([range(20_000)])
    os.fsync(corpus.fd)
    os.posix_fadvise(corpus.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    cached = []
    for _ in range(2):
        cached.append(_are_cached([(corpus.fd, 100, 0), (corpus.fd, 100, 30_000)]))
        os.pread(corpus.fd, 40_000, 0)
    assert cached in (
        [False, True],
        [True, True],
        [False, False],
    )  # on a disk; on tmpfs; on a filesystem that does not report it
    assert not _are_cached([(corpus.fd, 100, 39_950)])  # beyond the end of the file


def test_inputs_and_labels_are_pinned_separately(corpora, monkeypatch):
    """Nothing can be pinned without a GPU, so the calls of pin_memory are recorded instead."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append(tensor) or tensor.clone())
    pinned, plain = (loader(corpora, accumulation=2, pinned=on).batches(0) for on in (True, False))
    assert [part.shape for part in calls] == [(4, 16)] * 4
    assert all(part.is_contiguous() for part in calls)  # else the copy goes through memory that is not pinned
    for ours, theirs in zip(pinned, plain, strict=True):
        assert all(map(torch.equal, ours, theirs))
        assert ours.labels.data_ptr() != ours.input_ids.data_ptr() + 8  # these are the copies


@pytest.mark.parametrize("layout", [(1, 24, 1), (1, 2, 12), (2, 3, 4), (2, 12, 1), (3, 4, 2), (4, 1, 6), (4, 6, 1)])
def test_an_update_trains_the_same_samples_on_every_layout(corpora, layout):
    data_parallel, micro_batch, accumulation = layout
    whole = loader(corpora, micro_batch=24)
    shape = {"micro_batch": micro_batch, "accumulation": accumulation, "data_parallel": data_parallel}
    ranks = [loader(corpora, rank=rank, **shape) for rank in range(data_parallel)]
    for position in (0, 24, 48, 1_000_000):
        steps = zip(*(rank.batches(position) for rank in ranks), strict=True)
        together = [sample for step in steps for sample in samples(step)]
        assert together == samples(whole.batches(position))


@given(positions=st.lists(st.integers(0, 2000), max_size=6))
@ANY_FIXTURE
def test_batches_do_not_depend_on_earlier_calls(corpora, positions):
    used = loader(corpora)
    for position in [*positions, 40, 44, 48]:
        expected = expected_samples(used, corpora, range(position, position + 4))
        assert samples(used.batches(position)) == expected


def test_an_epoch_trains_each_sample_once(corpora):
    data = loader(corpora[:1], micro_batch=1)
    firsts = [samples(data.batches(position))[0][0] for position in range(data.sampler.samples_per_epoch)]
    assert np.array_equal(np.diff(sorted(firsts)), np.full(len(firsts) - 1, 16))


def test_the_fingerprint_depends_on_data_order_and_seq_len_only(corpora, make_corpus):
    same = loader(corpora).fingerprint
    assert loader(corpora, micro_batch=2, accumulation=5).fingerprint == same
    copy = make_corpus([range(0, 3000), range(3000, 5000)])
    assert loader([copy, corpora[1]]).fingerprint == same
    other = make_corpus([range(0, 3000), [*range(3000, 4999), 7]])
    others = [
        loader([other, corpora[1]]),
        loader(corpora[::-1]),
        loader(corpora[:1]),
        loader(corpora, weights=(1.0, 2.0)),
        loader(corpora, seq_len=15),
        loader(corpora, seed=8),
    ]
    assert all(data.fingerprint != same for data in others)
    assert same["sources"][0]["tokens"] == 5000


def test_a_changed_file_without_a_sidecar_changes_the_fingerprint(make_corpus):
    one, other = (make_corpus([[*range(3000), last]], verified=False) for last in (5, 6))
    assert loader([one]).fingerprint != loader([other]).fingerprint
    assert loader([one]).fingerprint["sources"][0]["crc32"] is None


def test_a_corpus_without_a_sidecar_is_noted_as_unverified(make_corpus):
    corpus = make_corpus([range(3000)], verified=False)
    name = corpus.prefix.rsplit("/", 1)[1]
    assert loader([corpus]).notes == (f"{corpus.prefix}: unverified, since it has no {name}.json",)
    assert loader([make_corpus([range(3000)])]).notes == ()


@pytest.mark.parametrize(
    ("verified", "index"), [(True, 0), (True, 100_000), (True, 199_999), (False, 0), (False, 199_999)]
)
def test_ids_that_the_model_does_not_know_are_found_before_training(make_corpus, verified, index):
    ids = np.full(200_000, 9)
    ids[index] = 999
    corpus = make_corpus([ids], vocab_size=1000, verified=verified)
    with pytest.raises(UserError) as error:
        loader([corpus], vocab_size=999)
    by_sidecar = "has a vocabulary of 1000, but the model has only 999"
    by_ids = "holds token ids such as 999, but the model knows only 0 to 998"
    assert str(error.value) == (
        f"megagpt: the corpus {by_sidecar if verified else by_ids}\n  {corpus.prefix}\n"
        "  do: set model.vocab_size to that of the tokenizer, or prepare the corpus with the model's tokenizer"
    )
    loader([corpus], vocab_size=1000)


def test_many_unknown_ids_in_a_foreign_corpus_are_found_by_probing(make_corpus):
    ids = np.full(1_000_000, 9)
    ids[300_000:340_000] = 999
    with pytest.raises(UserError, match="token ids such as 999"):
        loader([make_corpus([ids], vocab_size=1000, verified=False)], vocab_size=999)


def test_a_corpus_shorter_than_one_sample_is_rejected(make_corpus):
    corpus = make_corpus([range(16)])
    with pytest.raises(UserError) as error:
        loader([make_corpus([range(17)]), corpus])
    assert str(error.value) == (
        f"megagpt: the corpus has 16 tokens, fewer than one sample (17)\n  {corpus.prefix}\n"
        "  do: prepare more text, or lower model.seq_len"
    )


@pytest.mark.parametrize("layout", [(1, 24, 1), (2, 3, 4), (3, 2, 4)])
def test_skipped_positions_do_not_move_other_samples(corpora, layout):
    data_parallel, micro_batch, accumulation = layout
    shape = {"micro_batch": micro_batch, "accumulation": accumulation, "data_parallel": data_parallel}
    skip = [(5, 6), (40, 70), (95, 95)]
    ranks = [loader(corpora, rank=rank, skip=skip, **shape) for rank in range(data_parallel)]
    kept = [position for position in range(200) if not any(first <= position <= last for first, last in skip)]
    position = 0
    for update in range(4):
        expected = kept[update * 24 : update * 24 + 24]
        steps = zip(*(rank.batches(position) for rank in ranks), strict=True)
        together = [sample for step in steps for sample in samples(step)]
        assert together == expected_samples(ranks[0], corpora, expected)
        position += ranks[0].positions_used(position)
        assert position == expected[-1] + 1
    assert samples(ranks[0].batches(40)) == samples(ranks[0].batches(71))  # a checkpoint may be within a skipped range


@pytest.mark.parametrize("sizes", [(24,), (8, 16), (12, 4, 8), (1, 2, 3, 18)])
def test_the_order_continues_with_another_global_batch(corpora, sizes):
    position, seen = 100, []
    for size in sizes:  # a run that is resumed each time
        seen += samples(loader(corpora, micro_batch=size).batches(position))
        position += size
    assert seen == expected_samples(loader(corpora), corpora, range(100, 124))


def damage(how):
    """Return a function that changes a file while it is being read."""

    def shorten(path):
        os.truncate(path, 1000)

    def overwrite(path):
        with path.open("r+b") as file:
            file.write(b"\1\2\3\4")
        os.utime(path, (1, 1))  # a coarse clock may not have advanced since the file was written

    def lengthen(path):
        with path.open("ab") as file:
            file.write(b"\0\0")

    return {"shorten": shorten, "overwrite": overwrite, "lengthen": lengthen}[how]


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("shorten", "had 10,000 bytes, now has 1,000"),
        ("lengthen", "had 10,000 bytes, now has 10,002"),
        ("overwrite", "was overwritten"),
    ],
)
@pytest.mark.parametrize("reader", ["training", "validation"])
def test_a_corpus_that_changes_during_a_run_is_reported(corpora, how, what, reader):
    path = corpus_file(corpora[0].prefix, ".bin")
    if reader == "training":
        data = loader(corpora)
        read = lambda: [data.batches(0) for _ in corpora]  # noqa: E731  # each call checks one corpus
    else:
        data = EvaluationBatches(corpora[0], seq_len=16, vocab_size=50_000, micro_batch=4)
        read = lambda: list(data.batches())  # noqa: E731
    read()
    damage(how)(path)
    with pytest.raises(CorpusChanged) as error:
        read()
    assert str(error.value) == (
        f"{path} has changed while it was in use: it {what}. Restore it and run the same command again; "
        "training resumes from its last checkpoint"
    )


def test_a_corpus_truncated_between_check_and_read_is_reported(corpora):
    data = loader(corpora[:1])
    data._readers[0].check_unchanged = lambda: os.truncate(corpus_file(corpora[0].prefix, ".bin"), 0)
    with pytest.raises(CorpusChanged, match="it was truncated"):
        data.batches(0)


def test_a_corpus_may_be_touched_replaced_or_removed_during_a_run(corpora):
    data = loader(corpora)
    expected = samples(data.batches(8))
    path = corpus_file(corpora[0].prefix, ".bin")
    os.utime(path)
    assert samples(data.batches(8)) == expected
    path.with_suffix(".new").write_bytes(b"another")
    path.with_suffix(".new").replace(path)
    assert samples(data.batches(8)) == expected
    path.unlink()
    assert samples(data.batches(8)) == expected


def test_sources_of_different_id_types_blend(make_corpus):
    corpora = [make_corpus([range(3000)], vocab_size=60_000), make_corpus([range(60_000, 62_000)], vocab_size=70_000)]
    assert [corpus.tokens.dtype for corpus in corpora] == ["uint16", "int32"]
    data = loader(corpora, vocab_size=70_000)
    assert samples(data.batches(96)) == expected_samples(data, corpora, range(96, 100))


def test_a_corpus_of_another_tokenizer_is_rejected(corpora, tmp_path):
    file = tmp_path / "other.model"
    file.write_bytes(b"another")
    with pytest.raises(UserError) as error:
        loader(corpora, tokenizer=str(file))
    assert str(error.value) == (
        f"megagpt: different tokenizers were used\n  000000000000…  {corpora[0].prefix}\n"
        f"  ae448ac86c4e…  {file}\n  do: use the tokenizer that the corpus was prepared with, "
        "or prepare the corpus again"
    )


def test_loading_writes_no_files(corpora, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    loader(corpora).batches(0)
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_may_count_epochs_of_a_source(corpora):
    data = loader(corpora, weights=(1.0, 2.0), by_epochs=True)  # 5,000 tokens once, 1,500 twice
    assert data.sampler.fractions == pytest.approx((5 / 8, 3 / 8), rel=1e-3)
    assert data.fingerprint != loader(corpora, weights=(1.0, 2.0)).fingerprint


def test_the_corpora_define_the_token_that_ends_a_document(make_corpus):
    data = loader([make_corpus([[*range(2000), 5]] * 3 + [[]], eod=5)] * 2)
    assert data.document_end(None) == data.document_end(5) == 5
    foreign = loader([make_corpus([[*range(2000), 5]] * 3, eod=5, verified=False)])
    assert foreign.document_end(5) == 5


@pytest.mark.parametrize(
    ("ends", "recorded", "given", "message"),
    [
        ((5,), (5,), 6, "the corpora disagree about the token that ends a document\n  6  data.eod\n  5  {0}\n"),
        ((5, 7), (5, 7), None, "the corpora disagree about the token that ends a document\n  5  {0}\n  7  {1}\n"),
        (
            (5,),
            (None,),
            None,
            "no corpus defines the token that ends a document\n  data.document_mask\n  do: set data.eod",
        ),
        ((9,), (5,), None, "document 0 ends with the token 9, not with the end-of-document token 5\n  {0}\n"),
        ((9,), (None,), 5, "document 0 ends with the token 9, not with the end-of-document token 5\n  {0}\n"),
    ],
)
def test_an_ambiguous_end_of_document_token_is_rejected(make_corpus, ends, recorded, given, message):
    corpora = [
        make_corpus([[*range(2000), end]], eod=eod or 0, verified=eod is not None)
        for end, eod in zip(ends, recorded, strict=True)
    ]
    with pytest.raises(UserError) as error:
        loader(corpora).document_end(given)
    assert message.format(*(corpus.prefix for corpus in corpora)) in str(error.value)


@pytest.mark.parametrize("call", ["pread", "fstat"])
def test_an_unavailable_filesystem_is_reported(corpora, monkeypatch, call):
    def stale(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    data = loader(corpora)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, stale)
        with pytest.raises(CorpusChanged) as error:
            data.batches(0)
    assert "corpus-0.bin has changed while it was in use: it can no longer be read: Stale file handle" in str(
        error.value
    )


def test_a_short_read_is_repeated(corpora, monkeypatch):
    data, pread, calls = loader(corpora), os.pread, []

    def short_at_first(file, size, offset):
        calls.append(size)
        return pread(file, size if len(calls) > 1 else 5, offset)

    monkeypatch.setattr(os, "pread", short_at_first)
    assert samples(data.batches(0)) == expected_samples(data, corpora, range(4))
    assert len(calls) == 8


def test_validation_on_a_training_corpus_is_refused_however_its_path_is_spelled(corpora, tmp_path):
    data = loader(corpora)
    data.refuse_validation_on(CorpusReader(_copy(corpora[1], tmp_path / "other", changed=True)))
    link = tmp_path / "link"
    link.symlink_to(os.path.dirname(corpora[1].prefix) or ".")
    spellings = [
        os.path.relpath(corpora[1].prefix),
        f"{link}/{os.path.basename(corpora[1].prefix)}",
        _copy(corpora[1], tmp_path / "copy"),
    ]
    for prefix in spellings:
        with pytest.raises(UserError, match="the validation corpus is also trained on") as caught:
            data.refuse_validation_on(CorpusReader(prefix))
        assert prefix in str(caught.value)


def _copy(corpus, prefix, changed=False):
    """Copy a corpus without its sidecar, with another last token if `changed`."""
    for suffix in (".bin", ".idx"):
        content = bytearray(corpus_file(corpus.prefix, suffix).read_bytes())
        if changed and suffix == ".bin":
            content[-2] ^= 1
        corpus_file(prefix, suffix).write_bytes(content)
    return str(prefix)
