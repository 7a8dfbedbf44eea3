"""Fixtures: a tokenizer trained once, Megatron's own reader and writer, and corpora made from ids."""

import itertools
import warnings

import pytest

from megagpt.corpus.reader import CorpusReader
from megagpt.corpus.writer import CorpusWriter
from megagpt.prepare.readers.default_corpus import default_corpus
from megagpt.tokenizer.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def texts():
    return [document.text for document in itertools.islice(default_corpus().documents, 6)]


@pytest.fixture(scope="session")
def tokenizer(texts, tmp_path_factory):
    return Tokenizer(train_tokenizer(texts, 700, tmp_path_factory.mktemp("tokenizer") / "small"))


@pytest.fixture(scope="session")
def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about every GPU package that is missing
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@pytest.fixture
def make_corpus(tmp_path):
    """Return a function that writes documents of ids, with three bytes of text per id, and opens the corpus."""
    numbers = itertools.count()

    def make(documents, vocab_size=50_000, eod=1, verified=True):
        prefix = tmp_path / f"corpus-{next(numbers)}"
        with CorpusWriter(prefix, vocab_size) as writer:
            for ids in documents:
                writer.add_document(ids, 3 * len(ids))
            writer.finish("0" * 64, eod)
        if not verified:
            prefix.with_name(prefix.name + ".json").unlink()
        return CorpusReader(prefix)

    return make
