"""Lossless conversion of text to token ids and back, and training of SentencePiece tokenizers."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from megagpt.errors import UserError
from megagpt.tokenizer.huggingface_tiktoken import HuggingFaceTokenizer, TokenizerBackend, tiktoken_encoding
from megagpt.tokenizer.line_sample import BoundedSample
from megagpt.tokenizer.sentencepiece_model import EOD_PIECE, NEWLINE_ID, SentencepieceModel

SAMPLE_BYTES = 20_000_000  # more text hardly changes the merges
_TRAINING_LINE = re.compile(r"[^\n]{1,2000}(?=[ \n]|\Z)|[^\n]{1,2000}")  # a line, or part of it up to a space
_SURROGATE = re.compile("[\ud800-\udfff]")

# Settings for an exact round trip: bytes for rare characters, no normalization, no spaces added or removed, and the
# newline as a symbol of its own, which no merge crosses.
_LOSSLESS: dict[str, Any] = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "user_defined_symbols": ["\n"],
    "unk_id": 0,
    "eos_id": 1,
    "eos_piece": EOD_PIECE,
    "bos_id": -1,
    "pad_id": -1,
}


def without_surrogates(text: str) -> str:
    """Return `text` with every lone surrogate replaced by U+FFFD, so that it can be encoded as UTF-8."""
    return text if _is_unicode(text) else replace_surrogates(text)[0]


def replace_surrogates(text: str) -> tuple[str, int]:
    """Replace every lone surrogate of `text` by U+FFFD; return the text and the number of replacements."""
    return _SURROGATE.subn("\ufffd", text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Tokenizer:
    """A SentencePiece model, a Hugging Face `tokenizer.json`, or a tiktoken encoding.

    Args:
        path: path of the file, or the name of a tiktoken encoding.

    Attributes:
        vocab_size: number of ids.
        eod: id of the end-of-document token.
        sha256: hash of the file.
        unknown: id of text that no piece covers; None if such text is encoded as bytes.
        control_symbols: spellings of the ids that no text encodes to.
        is_word_local: whether the ids of a text are those of its lines and words; spaces belong to the word after
            them.

    Raises:
        UserError: the file is missing, is no tokenizer, or has no end-of-document token.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._backend = backend = _load_backend(self.path)
        self.sha256 = backend.sha256
        self.vocab_size = backend.vocab_size
        self.eod = backend.eod
        self.unknown = backend.unknown
        self.control_symbols = backend.control_symbols
        self.is_word_local = backend.is_word_local

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path]]:
        return Tokenizer, (self.path,)  # pickled by path: another process opens the file itself

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, never `eod`. Lone surrogates are encoded as U+FFFD.

        For word-local tokenizers the text is split at newlines, which gives the same ids but is several times faster
        on long documents: SentencePiece's BPE slows down with the length of its input.
        """
        text = without_surrogates(text)
        if not self.is_word_local:
            return self.encode_all([text])[0]
        first, *others = self.encode_all(text.split("\n"))
        ids = first
        for line in others:
            ids.append(NEWLINE_ID)
            ids += line
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without splitting it. Texts must not hold lone surrogates."""
        return self._backend.encode_all(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; `eod` gives no text. Raises UserError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UserError(
                f"token ids {min(ids)} to {max(ids)} do not fit the vocabulary of {self.vocab_size}",
                str(self.path),
                "use the tokenizer that the tokens were made with",
            )
        return self._backend.decode(ids)


def _load_backend(path: Path) -> TokenizerBackend:
    """Load a tokenizer file by its content, or a tiktoken encoding by its name if there is no such file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and (encoding := tiktoken_encoding(str(path))):
            return encoding
        do = "train one with `megagpt tokenizer train`, or correct the path"
        raise UserError(f"cannot read the tokenizer: {error.strerror}", str(path), do) from None
    if content.lstrip().startswith(b"{"):
        return HuggingFaceTokenizer(content, str(path))
    return SentencepieceModel(content, str(path))


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    output_prefix: str | os.PathLike[str],
    sample_bytes: int = SAMPLE_BYTES,
) -> Path:
    """Train a lossless SentencePiece BPE model and write it to `output_prefix`.model.

    The training text is sampled by hash over the whole input, so memory is bounded (about 10 bytes per byte of the
    sample) and the same texts give the same file.

    Args:
        documents: texts.
        vocab_size: number of ids, including special ones.
        output_prefix: path without `.model`.
        sample_bytes: maximum bytes of text to train on.

    Returns:
        Path of the model.

    Raises:
        UserError: there is no text, or the vocabulary is too small or too large for it.
    """
    lines = sample_lines(documents, sample_bytes)
    if not lines:
        raise UserError(
            "no text to train a tokenizer on",
            "",
            "give files that hold text (in JSON lines or a table under --text-key), or `default`",
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            max_sentence_length=8192,  # bytes; lines have at most 2,000 characters, and longer ones would be skipped
            num_threads=1,
            minloglevel=2,  # no warnings and information on the console
            **_LOSSLESS,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from None
    return _publish(model.getvalue(), Path(f"{os.fspath(output_prefix)}.model"))


def sample_lines(documents: Iterable[str], sample_bytes: int) -> list[str]:
    """Sample lines by the hash of their index (see `BoundedSample`): `sample_bytes` in total, in input order."""
    sample = BoundedSample(sample_bytes)
    for index, line in enumerate(line for text in documents for line in training_lines(without_surrogates(text))):
        sample.add((0, index), line)
    return sample.texts()


def training_lines(text: str) -> Iterator[str]:
    """Yield the lines of a text to train on: not blank, and at most 2,000 characters each."""
    for match in _TRAINING_LINE.finditer(text):
        if not match[0].isspace():
            yield match[0]


def _training_error(message: str, vocab_size: int) -> UserError:
    """Convert SentencePiece's error about the vocabulary size into a UserError."""
    if limit := re.search(r"set it to a value <= (\d+)", message):
        do = f"give at most {limit[1]}, or more text"
        return UserError(f"a vocabulary of {vocab_size} is too large for this text", "--vocab-size", do)
    if limit := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        do = f"give at least {limit[1]}, which the bytes and characters of this text need"
        return UserError(f"a vocabulary of {vocab_size} is too small for this text", "--vocab-size", do)
    return UserError(f"SentencePiece could not train: {message}", "", "check the input text")


def _publish(content: bytes, path: Path) -> Path:
    """Write the file under a temporary name and rename it when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
