"""A document of over 2³¹ tokens in one JSON line becomes several sequences. Without --full, the limit is lower."""

import json

import numpy as np
import pytest
import zstandard

from megagpt.corpus import writer
from megagpt.corpus.reader import CorpusReader
from megagpt.corpus.verify import verify
from megagpt.data.loader import Loader
from megagpt.prepare import encode
from megagpt.prepare.command import PrepareOptions, prepare_command
from megagpt.prepare.input_warnings import WARNING_KINDS
from megagpt.tokenizer.tokenizer import Tokenizer

WORD = " 1234567890123456789012345678901"  # one token per character: digits are not merged
MORE = 100


@pytest.fixture
def limit(request, monkeypatch):
    if request.config.getoption("--full"):
        return 2**31 - 1
    monkeypatch.setattr(writer, "MAX_SEQUENCE", 5_000_000)
    monkeypatch.setattr(encode, "MAX_SEQUENCE", 5_000_000)
    return 5_000_000


def test_a_document_of_too_many_tokens_becomes_several_sequences(model, tmp_path, limit):
    block = WORD * 32_768
    repeats, rest = divmod(limit + MORE - 1, len(WORD))
    path = tmp_path / "a.jsonl.zst"
    with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(repeats // 32_768):
            file.write(block.encode())
        file.write((WORD * (repeats % 32_768) + WORD[:rest]).encode())
        file.write(b'"}\n{"text": "after"}\n')
    summary = prepare_command([str(path)], model, tmp_path / "c", PrepareOptions(0, workers=1))
    path.unlink()
    assert [str(one) for one in summary.oddities] == [f"warning: {WARNING_KINDS['long']}: 1 (first: {path}:2)"]

    reader, tokenizer = CorpusReader(tmp_path / "c.train"), Tokenizer(model)
    before, after, word_ids = (tokenizer.encode(text) for text in ("before", "after", WORD))
    assert len(word_ids) == len(WORD)
    assert reader.lengths.tolist() == [len(before) + 1, limit, MORE, len(after) + 1]
    assert reader.documents.tolist() == [0, 1, 3, 4]
    document = reader.document(1)
    assert len(document) == limit + MORE
    assert document[-1] == tokenizer.eod
    for at in range(0, len(document) - 1, 1 << 24):
        ids = document[at : min(at + (1 << 24), len(document) - 1)]
        start = at % len(word_ids)
        assert np.array_equal(ids, np.resize(word_ids[start:] + word_ids[:start], len(ids)))
    assert tokenizer.decode(reader.document(2)[:-1]) == "after"
    assert verify(summary.train.prefix).wrong == ()

    loader = Loader([(reader.prefix, 1.0)], seq_len=64, seed=1, vocab_size=tokenizer.vocab_size, micro_batch=1)
    start = len(before) + 1 + limit - 32  # around the end of the first sequence
    around = np.frombuffer(reader.read_range(start, 64), reader.dtype)
    assert np.array_equal(around, document[limit - 32 : limit + 32])
    assert loader.sampler.samples_per_epoch == len(reader.tokens) // 64 - 1
    assert json.loads((tmp_path / "c.train.json").read_text())["made"]["odd"] == {"long": 1}
