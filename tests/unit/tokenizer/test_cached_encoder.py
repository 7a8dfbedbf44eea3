import io

import numpy as np
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.tokenizer import cached_encoder as encoder_module
from megagpt.tokenizer.cached_encoder import CachedEncoder
from megagpt.tokenizer.tokenizer import Tokenizer
from tests.unit.tokenizer.test_tokenizer import AWKWARD, foreign_model

TEXT = st.lists(
    st.one_of(st.text(max_size=12), st.text("ab \n\u2581=", max_size=30), AWKWARD.filter(lambda s: s != "\ud83d"))
).map("".join)


def encode_whole(tokenizer, text):
    """Encode the whole text with SentencePiece alone."""
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path)).encode(text)


def ids(encoded):
    return [np.frombuffer(one, "<u2").tolist() for one in encoded]


@given(batches=st.lists(st.lists(TEXT, max_size=5), max_size=4), most=st.sampled_from([0, 5, 1000]))
@settings(max_examples=300)
def test_cached_words_give_the_ids_of_the_whole_text(tokenizer, batches, most):
    encoder = CachedEncoder(tokenizer)
    assert encoder.is_word_local
    cached = []
    for texts in batches:
        before, encoder_module._MAX_WORDS = encoder_module._MAX_WORDS, most
        try:
            cached += ids(encoder.encode(texts))
        finally:
            encoder_module._MAX_WORDS = before
    assert cached == [encode_whole(tokenizer, text) for texts in batches for text in texts]


def test_cached_words_give_the_ids_of_whole_documents(tokenizer, texts):
    encoder = CachedEncoder(tokenizer)
    for _ in range(2):  # cold and warm
        assert ids(encoder.encode(texts)) == [encode_whole(tokenizer, text) for text in texts]


def trained(path, **changes):
    """Train a model with our settings, except for `changes`."""
    settings = {
        "model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True,
        "user_defined_symbols": ["\n"], "unk_id": 0, "eos_id": 1, "eos_piece": "<eod>", "bos_id": -1, "pad_id": -1,
    }  # fmt: skip
    text = ["the quick brown fox  jumps over the lazy dog == = =", "and so on and so forth"] * 10
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, minloglevel=2, hard_vocab_limit=False, **settings | changes
    )
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


def test_models_that_are_not_word_local_encode_whole_texts(tmp_path):
    assert trained(tmp_path / "like-ours.model").is_word_local
    others = [
        {"model_type": "unigram"},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"split_by_whitespace": False},
        {"user_defined_symbols": ["\n", "a b"]},
        {"user_defined_symbols": []},
        {"treat_whitespace_as_suffix": True},
    ]
    for number, change in enumerate(others):
        model = trained(tmp_path / f"{number}.model", **change)
        assert not model.is_word_local, change
        text = "fox  and\n  the =  == x "
        assert ids(CachedEncoder(model).encode([text])) == [encode_whole(model, text)]
    assert not Tokenizer(foreign_model(tmp_path / "foreign.model")).is_word_local


def test_a_large_vocabulary_takes_four_bytes_per_id(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 65_500)
    encoder = CachedEncoder(tokenizer)
    assert encoder.width == 4
    assert np.frombuffer(encoder.encode(["the end"])[0], "<i4").tolist() == tokenizer.encode("the end")
    assert np.frombuffer(encoder.end, "<i4").tolist() == [tokenizer.eod]
