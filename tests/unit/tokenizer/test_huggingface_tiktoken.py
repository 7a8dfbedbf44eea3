import hashlib
import sys

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megagpt.errors import UserError
from megagpt.tokenizer.cached_encoder import CachedEncoder
from megagpt.tokenizer.tokenizer import Tokenizer

END = "<|endoftext|>"
TEXT = st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from([END, " the", "\n"])))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """Train a byte-level BPE with a leading token, padding and truncation, all of which must be disabled."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the quick brown fox and the lazy dog"] * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(10)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def local_encoding(monkeypatch):
    """Replace tiktoken's download by an encoding of the bytes and one merge."""
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256}
    encoding = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={END: 257})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    return encoding


@pytest.fixture
def encoding(monkeypatch):
    return local_encoding(monkeypatch)


@given(texts=st.lists(TEXT.map("".join), max_size=4))
def test_a_tokenizer_json_never_encodes_text_to_control_symbols(hugging_face, texts):
    model = Tokenizer(hugging_face)
    encoded = [np.frombuffer(ids, "<u2").tolist() for ids in CachedEncoder(model).encode(texts)]
    plain = tokenizers.Tokenizer.from_file(str(hugging_face))
    plain.no_truncation()
    plain.no_padding()
    for text, ids in zip(texts, encoded, strict=True):
        assert model.decode(ids) == text
        assert model.eod not in ids
        if END not in text and "<s>" not in text:
            assert ids == plain.encode(text, add_special_tokens=False).ids
    assert [model.encode(text) for text in texts] == encoded


def test_attributes_match_the_tokenizer_json(hugging_face):
    model = Tokenizer(hugging_face)
    assert (model.vocab_size, model.eod, model.unknown, model.is_word_local) == (284, 1, None, False)
    assert model.control_symbols == ("<s>", END)
    assert model.decode([model.eod, *model.encode("the fox"), model.eod]) == "the fox"
    assert model.sha256 == hashlib.sha256(hugging_face.read_bytes()).hexdigest()


@given(text=TEXT.map("".join))
def test_a_tiktoken_encoding_never_encodes_text_to_control_symbols(text):
    with pytest.MonkeyPatch.context() as patch:
        expected = local_encoding(patch)
        model = Tokenizer("gpt2")
        assert (model.vocab_size, model.eod, model.control_symbols) == (258, 257, (END,))
        ids = model.encode(text)
        assert ids == expected.encode_ordinary(text)
        assert model.decode([*ids, model.eod]) == text
        assert model.eod not in ids


def test_encodings_differ_in_their_hash(encoding, monkeypatch):
    one = Tokenizer("gpt2").sha256
    ranks = {bytes([i]): i for i in range(256)} | {b"he": 256}
    other = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={END: 257})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: other)
    assert Tokenizer("gpt2").sha256 != one


def rejection(path):
    with pytest.raises(UserError) as error:
        Tokenizer(path)
    return str(error.value).removeprefix("megagpt: ")


def test_unusable_tokenizers_are_rejected(hugging_face, encoding, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    what, where, do = rejection(path).splitlines()
    assert what.startswith("not a Hugging Face tokenizer: ")
    assert (where, do) == (f"  {path}", "  do: give its tokenizer.json")
    path.write_text(hugging_face.read_text().replace(END, "<|other|>"))
    assert rejection(path).startswith("the tokenizer has no end-of-document token (none of <|endoftext|>, ")
    assert rejection("cl100k_base").splitlines()[0].startswith("cannot load this encoding: ")
    assert rejection("no-such-name").splitlines()[0] == "cannot read the tokenizer: No such file or directory"
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert rejection("gpt2").splitlines()[0] == "cannot read the tokenizer: No such file or directory"
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert rejection(hugging_face) == (
        f'a tokenizer.json needs the package tokenizers\n  {hugging_face}\n  do: pip install "megagpt[tokenizers]"'
    )
