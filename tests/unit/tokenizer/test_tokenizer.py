import io
import os
import subprocess
import sys

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.errors import UserError
from megagpt.tokenizer.tokenizer import Tokenizer, sample_lines, train_tokenizer

ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates too
AWKWARD = st.sampled_from(
    ["\n", " ", "  ", "\t", "\r\n", "\u2581", "<eod>", "<unk>", "<s>", "<0x41>", "\0", "\ufeff", "\u2028", "\x85"]  # noqa: RUF005
    + ["ﬁ", "½", "４", "e\u0301", "\xa0", "👩‍👩‍👧", "中文", "\ud83d", " the", "President", "1234"]
)
ANY_TEXT = st.lists(st.one_of(st.text(ANY_CHARACTER), AWKWARD)).map("".join)


def encode_whole(tokenizer, text):
    """Encode the whole text with SentencePiece alone."""
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path)).encode(text)


@given(text=ANY_TEXT)
@settings(max_examples=300)
def test_any_text_survives_the_round_trip_except_surrogates_and_u2581(tokenizer, text):
    expected = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else " " if c == "\u2581" else c for c in text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == expected
    assert tokenizer.eod not in ids


@given(text=st.lists(st.one_of(st.text(max_size=20), AWKWARD.filter(lambda s: s != "\ud83d"))).map("".join))
def test_splitting_at_newlines_gives_the_same_ids(tokenizer, text):
    assert tokenizer.encode(text) == encode_whole(tokenizer, text)


def test_splitting_at_newlines_is_exact_on_documents(tokenizer, texts):
    for text in texts:
        assert "\n" in text
        assert tokenizer.encode(text) == encode_whole(tokenizer, text)


def test_attributes_match_the_model_file(tokenizer):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert tokenizer.vocab_size == model.vocab_size() == 700
    assert model.is_control(tokenizer.eod)
    assert model.id_to_piece(tokenizer.eod) == "<eod>"
    assert (model.bos_id(), model.pad_id()) == (-1, -1)
    assert tokenizer.decode([tokenizer.eod, *tokenizer.encode("a\nb"), tokenizer.eod]) == "a\nb"


def test_common_words_become_one_token(tokenizer):
    assert len(tokenizer.encode(" the")) == 1


def test_training_is_deterministic_and_prints_nothing(texts, tmp_path):
    code = "import sys; from megagpt.tokenizer.tokenizer import train_tokenizer\n"
    code += "train_tokenizer(open(sys.argv[1]).read().split('\\f'), 500, sys.argv[2])"
    (tmp_path / "text").write_text("\f".join(texts[:3]))
    models = []
    for seed in "12":
        arguments = [sys.executable, "-c", code, tmp_path / "text", tmp_path / f"t{seed}"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        result = subprocess.run(arguments, capture_output=True, env=environment, check=True)
        assert (result.stdout, result.stderr) == (b"", b"")
        models.append((tmp_path / f"t{seed}.model").read_bytes())
    assert models[0] == models[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t1.model", "t2.model", "text"]


def test_a_document_without_newlines_is_used_for_training(tmp_path):
    # SentencePiece skips inputs longer than its limit, and only logs it
    model = Tokenizer(train_tokenizer(["wonderful " * 5000], 290, tmp_path / "t"))
    assert len(model.encode(" wonderful")) == 1


def test_the_sample_is_bounded_spread_out_and_in_order():
    documents = [f"{d:02d} line {n:03d}\n" * 1 for d in range(50) for n in range(200)]
    sample = sample_lines(documents, 12_000)  # of 110,000 bytes
    assert 11_900 < sum(map(len, sample)) <= 12_000
    assert sample == sorted(sample)
    per_document = [sum(piece.startswith(f"{d:02d}") for piece in sample) for d in range(50)]
    assert min(per_document) >= 8  # 22 expected, standard deviation 4.4
    assert max(per_document) <= 40


@given(st.text(alphabet="ab \n", max_size=60).map(lambda text: text * 100))
def test_sampled_lines_are_short_and_omit_only_blank_lines(text):
    lines = sample_lines([text], 10**9)
    assert all(len(line) <= 2000 and "\n" not in line for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (
            [],
            500,
            "no text to train a tokenizer on\n"
            "  do: give files that hold text (in JSON lines or a table under --text-key), or `default`",
        ),
        (
            ["hello world, how are you"],
            1000,
            "a vocabulary of 1000 is too large for this text\n  --vocab-size\n  do: give at most 306, or more text",
        ),
        (
            ["hello world, how are you"],
            200,
            "a vocabulary of 200 is too small for this text\n  --vocab-size\n"
            "  do: give at least 271, which the bytes and characters of this text need",
        ),
    ],
    ids=["no text", "too large", "too small"],
)
def test_training_failures_are_reported(tmp_path, capfd, texts, vocab_size, message):
    with pytest.raises(UserError) as error:
        train_tokenizer(texts, vocab_size, tmp_path / "t")
    assert str(error.value) == f"megagpt: {message}"
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def foreign_model(path, **changes):
    """Train a model with SentencePiece's own defaults."""
    model = io.BytesIO()
    text = ["the quick brown fox jumps over the lazy dog", "and so on and so forth"] * 10
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=33, minloglevel=2, **changes
    )
    path.write_bytes(model.getvalue())
    return path


def test_a_foreign_model_encodes_whole_texts(tmp_path):
    model = Tokenizer(foreign_model(tmp_path / "foreign.model"))
    text = "the quick\nbrown fox\n and so on"
    assert model.encode(text) == encode_whole(model, text)
    assert model.eod == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            "cannot read the tokenizer: No such file or directory\n  {path}\n"
            "  do: train one with `megagpt tokenizer train`, or correct the path",
        ),
        (b"", "not a SentencePiece model\n  {path}\n  do: give the .model file that `megagpt tokenizer train` wrote"),
        (
            b"text",
            "not a SentencePiece model\n  {path}\n  do: give the .model file that `megagpt tokenizer train` wrote",
        ),
        (
            "no eos",
            "the tokenizer has no end-of-document token (SentencePiece's eos)\n  {path}\n"
            "  do: train one with `megagpt tokenizer train`, or choose a model that has an eos piece",
        ),
    ],
    ids=["missing", "empty", "text", "no eos"],
)
def test_files_that_are_no_tokenizer_are_rejected(tmp_path, capfd, content, message):
    path = tmp_path / "t.model"
    if content == "no eos":
        foreign_model(path, eos_id=-1)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Tokenizer(path)
    assert str(error.value) == "megagpt: " + message.format(path=path)
    assert capfd.readouterr() == ("", "")


def test_ids_of_another_vocabulary_are_rejected(tokenizer):
    with pytest.raises(UserError) as error:
        tokenizer.decode([5, 700])
    assert str(error.value) == (
        f"megagpt: token ids 5 to 700 do not fit the vocabulary of 700\n  {tokenizer.path}\n"
        "  do: use the tokenizer that the tokens were made with"
    )
