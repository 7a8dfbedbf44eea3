"""Packed corpora as training reads them: whole samples, padding that is no label, separate documents."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config.recipe import ModelSection
from megagpt.corpus.reader import CorpusReader, corpus_file
from megagpt.corpus.writer import CorpusWriter
from megagpt.data.evaluation_batches import EvaluationBatches
from megagpt.data.loader import Loader
from megagpt.data.sampler import Sampler
from megagpt.errors import UserError
from megagpt.inference import baselines
from megagpt.model.gpt import GPT
from megagpt.prepare.pack import pack
from megagpt.state import IGNORE_INDEX

SEQ_LEN, EOD = 16, 1
LENGTHS = [9, 17, 5, 40, 3, 3, 8, 12, 18, 2, 2, 11, 16, 15, 7, 4, 6]


@pytest.fixture
def packed(make_corpus, tmp_path):
    """Return packed documents in which every id but the end is unique; 18 and 35 tokens leave a lone end."""
    first, documents = 2, []
    for length in [*LENGTHS * 3, 35]:
        documents.append([*range(first, first + length - 1), EOD])
        first += length
    prefix = tmp_path / "packed"
    with CorpusWriter(prefix, 50_000) as writer:
        summary = pack(make_corpus(documents), writer, SEQ_LEN, EOD, tmp_path)
        writer.text_bytes = 3 * first
        writer.finish("0" * 64, EOD, None, SEQ_LEN, summary.padding)
    return CorpusReader(prefix)


def loader(corpora, weights=(1.0, 1.0), **changes):
    options = {"seq_len": SEQ_LEN, "seed": 7, "vocab_size": 50_000, "micro_batch": 1, **changes}
    return Loader([(corpus.prefix, weight) for corpus, weight in zip(corpora, weights, strict=False)], **options)


def rejection(call, *arguments, **named):
    with pytest.raises(UserError) as error:
        call(*arguments, **named)
    return str(error.value).removeprefix("megagpt: ")


@given(sources=st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_an_epoch_of_a_packed_source_has_each_sample_once(sources, seed):
    tokens = [count * 9 if is_packed else count * 8 + 9 for count, is_packed in sources]
    packed = [number for number, (_, is_packed) in enumerate(sources) if is_packed]
    sampler = Sampler(tokens, [1.0] * len(sources), 8, seed, packed)
    located = sampler.locate(range(sampler.block_size * 130))
    for number in packed:
        count = sources[number][0]
        assert sampler.samples[number] == count
        for epoch in range(3):
            starts = located.start[(located.source == number) & (located.epoch == epoch)]
            assert sorted(starts.tolist()) == [9 * sample for sample in range(count)]
    plain = Sampler(tokens, [1.0] * len(sources), 8, seed).locate(range(130))
    kept = ~np.isin(plain.source, packed)
    assert np.array_equal(plain.start[kept], located.start[:130][kept])


def test_a_batch_holds_whole_samples_and_padding_is_no_label(packed):
    data = loader([packed], micro_batch=2, accumulation=3)
    seen, labels = [], 0
    assert data.sampler.samples_per_epoch == len(packed) > 12
    for position in range(0, len(packed) - 5, 6):
        for batch in data.batches(position):
            assert [part.dtype for part in batch] == [torch.int64] * 2
            for inputs, label in zip(*(part.tolist() for part in batch), strict=True):
                # The hidden labels are known: an end-of-document token after another one.
                whole = [inputs[0], *(EOD if token == IGNORE_INDEX else token for token in label)]
                assert whole[:-1] == inputs
                hidden = [(a, b) == (EOD, EOD) for a, b in itertools.pairwise(whole)]
                assert [token == IGNORE_INDEX for token in label] == hidden
                seen.append(whole)
                labels += len(label) - sum(hidden)
    everything = [packed.sequence(number).tolist() for number in range(len(packed))]
    assert all(sample in everything for sample in seen)
    assert len({tuple(sample) for sample in seen}) == len(seen)
    assert labels > 0


def test_document_ends_are_labels_and_padding_is_not(packed):
    """Hidden are the padding and remainders of documents that consist of the end token alone, after another end."""
    data = loader([packed])
    labels = [token for n in range(len(packed)) for token in data.batches(n)[0].labels[0].tolist()]
    hidden = labels.count(IGNORE_INDEX)
    remainders = 3 + 1  # of 18 and 35 tokens: one more than one or two samples
    assert 0 < packed.sidecar.padding <= hidden <= packed.sidecar.padding + remainders
    ids = [token for token in labels if token not in (IGNORE_INDEX, EOD)]
    assert len(set(ids)) == len(ids)


def test_packed_and_other_sources_blend(packed, make_corpus):
    other = make_corpus([[*range(20_000, 20_400), 1, 1, *range(20_500, 21_000)]])
    data = loader([packed, other], micro_batch=64)
    found = {0: 0, 1: 0}
    (batch,) = data.batches(0)
    located = data.sampler.locate(range(64))
    for row, (source, start) in enumerate(zip(located.source, located.start, strict=True)):
        ids = (packed, other)[source].tokens[start : start + SEQ_LEN + 1].tolist()
        found[source] += 1
        assert batch.input_ids[row].tolist() == ids[:-1]
        assert source == 0 or batch.labels[row].tolist() == ids[1:]  # there two ends in a row are labels
        assert source == 1 or start % (SEQ_LEN + 1) == 0
    assert min(found.values()) > 10


def test_a_packed_corpus_needs_a_model_of_its_seq_len(packed):
    for seq_len in (8, 32, 100_000):  # the last one exceeds the corpus
        assert rejection(loader, [packed], seq_len=seq_len) == (
            f"the corpus is packed for a seq_len of 16, but the model has {seq_len}\n  {packed.prefix}\n"
            f"  do: set model.seq_len to 16, or prepare the corpus with --pack {seq_len}"
        )


def test_only_packing_is_added_to_the_fingerprint(packed, make_corpus):
    is_packed = loader([packed]).fingerprint
    assert is_packed["sources"][0]["packed"] == SEQ_LEN
    path = corpus_file(packed.prefix, ".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "packed": None}))
    assert loader([packed]).fingerprint != is_packed
    assert "packed" not in loader([packed]).fingerprint["sources"][0]  # as in earlier checkpoints


def test_a_packed_corpus_defines_the_end_of_document_token(packed):
    assert any(packed.document(number)[-1] != EOD for number in range(len(packed)))
    assert loader([packed]).document_end(None) == loader([packed]).document_end(EOD) == EOD
    assert "the corpora disagree" in rejection(loader([packed]).document_end, 5)


def test_a_packed_corpus_cannot_be_evaluated(packed):
    assert rejection(EvaluationBatches, packed, seq_len=16, vocab_size=50_000, micro_batch=4) == (
        f"the corpus is packed, so not all of its tokens can be predicted\n  {packed.prefix}\n"
        "  do: evaluate on a validation part, which is never packed, or prepare the text without --pack"
    )


def test_a_packed_corpus_without_its_sidecar_is_noted(packed, make_corpus):
    path = corpus_file(packed.prefix, ".json")
    path.unlink()
    unverified = f"{packed.prefix}: unverified, since it has no packed.json"
    assert loader([packed], seq_len=8).notes == (
        f"{unverified}; all its documents have 17 tokens, as if it was packed for a seq_len of 16, "
        "but without a sidecar samples cross document boundaries",
    )
    for documents in (
        [range(40)],
        [range(17), range(17), range(18)],
        [range(17), range(16), range(18)],
        [range(17)] * 9,
    ):
        other = make_corpus(documents, verified=False)
        assert ("as if it was packed" in loader([other]).notes[0]) == (len(documents) == 9)


def test_a_sidecar_with_other_sample_sizes_is_rejected(packed):
    path = corpus_file(packed.prefix, ".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "packed": 17}))
    assert rejection(CorpusReader, packed.prefix) == (
        f"the sidecar describes samples of 18 tokens, but those of the corpus differ\n  {path}\n"
        "  do: prepare the corpus again"
    )


def test_the_unigram_baseline_does_not_count_padding(packed, make_corpus):
    real = packed.tokens.tolist()
    for _ in range(packed.sidecar.padding):
        real.remove(EOD)
    held_out = make_corpus([[5, 6, EOD]])
    plain = make_corpus([real])
    assert baselines._unigram(packed, held_out, 9) == pytest.approx(baselines._unigram(plain, held_out, 9))


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_documents_of_a_sample_do_not_affect_each_other(packed, position):
    """Run batches of the loader through a model that masks attention at document boundaries."""
    section = ModelSection(
        n_layer=2, n_head=2, d_model=16, vocab_size=50_000, seq_len=SEQ_LEN, position=position, norm="rmsnorm"
    )
    torch.manual_seed(3)
    model, plain = GPT(section, EOD), GPT(section)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plain.load_state_dict(model.state_dict())
    data, compared = loader([packed]), 0
    for number in range(len(packed)):
        (batch,) = data.batches(number)
        ends = (batch.input_ids[0] == EOD).nonzero().flatten().tolist()
        if not ends or ends[0] in (0, SEQ_LEN - 1):
            continue
        compared += 1
        changed = batch.input_ids.clone()
        changed[0, : ends[0]] = 40_000
        begin = ends[0] + 1
        before, after = model(batch.input_ids).logits, model(changed).logits
        assert torch.equal(before[:, begin:], after[:, begin:])
        assert not torch.equal(before[:, :begin], after[:, :begin])
        assert not torch.equal(plain(batch.input_ids).logits[:, begin:], plain(changed).logits[:, begin:])
        # Each document has the same logits as when it is run alone.
        alone = plain(batch.input_ids[:, begin : ends[1] + 1 if len(ends) > 1 else None]).logits
        torch.testing.assert_close(before[:, begin : begin + alone.shape[1]], alone, rtol=1e-4, atol=1e-4)
    assert compared > 5
