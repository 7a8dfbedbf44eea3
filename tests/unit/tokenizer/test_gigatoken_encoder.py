"""gigatoken gives the ids of SentencePiece, or is rejected."""

import sys
from unittest.mock import patch

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.errors import UserError
from megagpt.tokenizer import gigatoken_encoder
from megagpt.tokenizer.gigatoken_encoder import GigatokenEncoder
from megagpt.tokenizer.tokenizer import Tokenizer
from tests import own_process
from tests.unit.tokenizer.test_cached_encoder import TEXT, trained


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return GigatokenEncoder(tokenizer)


def ids(encoded):
    return [np.frombuffer(one, "<u2").tolist() for one in encoded]


def encode_whole(tokenizer, texts):
    """Encode whole texts with SentencePiece alone."""
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path)).encode(texts)


@given(batch=st.lists(st.one_of(TEXT, st.text("<eod> \n", max_size=20)), max_size=5))
@settings(max_examples=300)
def test_ids_equal_those_of_sentencepiece(tokenizer, encoder, batch):
    assert ids(encoder.encode(batch)) == encode_whole(tokenizer, batch)


def test_ids_equal_those_of_sentencepiece_on_documents(tokenizer, encoder, texts):
    spelled = [
        text.replace(" the ", "<eod>", 3) for text in texts[:2]
    ]  # which gigatoken alone would encode as the control symbol
    for batch in ([*texts, *spelled], texts):
        assert ids(encoder.encode(batch)) == encode_whole(tokenizer, batch)


def memory_growth(model, cache_growth):
    """Bytes by which the process grows as it encodes words that never repeat: it caches about 9 per byte of text."""
    with patch.object(gigatoken_encoder, "_CACHE_GROWTH", cache_growth):
        tokenizer = Tokenizer(model)
        encoder, draw = GigatokenEncoder(tokenizer), np.random.default_rng(1)
        resident = []
        for _ in range(40):
            text = " ".join(f"{number:x}" for number in draw.integers(0, 1 << 40, 50_000).tolist())
            assert ids(encoder.encode([text[:2000]])) == encode_whole(tokenizer, [text[:2000]])
            encoder.encode([text])
            resident.append(own_process.resident_bytes())
    return max(resident) - resident[0]


def test_memory_is_bounded(tokenizer):
    bounded, unbounded = (own_process.run(memory_growth, tokenizer.path, limit) for limit in (8 << 20, 1 << 40))
    assert bounded < unbounded / 2


def test_an_incompatible_tokenizer_is_rejected(tmp_path):
    model = trained(tmp_path / "blank-before.model", add_dummy_prefix=True)
    with pytest.raises(UserError) as error:
        GigatokenEncoder(model)
    assert str(error.value) == (
        "megagpt: the engine gigatoken matches SentencePiece's ids only for tokenizers of `megagpt tokenizer train`\n"
        f"  {model.path}\n  do: leave out --engine: SentencePiece encodes with any tokenizer"
    )


def test_a_missing_package_is_reported(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(UserError) as error:
        GigatokenEncoder(tokenizer)
    assert str(error.value) == (
        "megagpt: the engine gigatoken needs the package gigatoken\n  --engine\n"
        '  do: pip install "megagpt[gigatoken]", or leave out --engine'
    )


def test_a_model_that_gigatoken_cannot_read_is_reported(tokenizer, monkeypatch):
    import gigatoken

    def refuse(content):
        raise ValueError("only byte_fallback sentencepiece models are supported")

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", refuse)
    with pytest.raises(UserError, match="cannot read the tokenizer: only byte_fallback"):
        GigatokenEncoder(tokenizer)
