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

SAMPLE_BYTES = 20_000_000  # maximum bytes of text to train on; more text hardly changes the merges
_TRAINING_LINE = re.compile(r"[^\n]{1,2000}(?=[ \n]|\Z)|[^\n]{1,2000}")  # a line, or part of a line up to a space
_SURROGATE = re.compile("[\ud800-\udfff]")

# Settings with which decoding restores the exact text. Rare characters are encoded as bytes, nothing is normalized, no
# spaces are added or removed, and the newline is a separate symbol, which no merge crosses.
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
    """Replace every lone surrogate in `text` with U+FFFD. Returns the new text and the number of replacements."""
    return _SURROGATE.subn("\ufffd", text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Tokenizer:
    """Tokenizer that uses a SentencePiece model, a Hugging Face `tokenizer.json` or a tiktoken encoding.

    Args:
        path: path of the file, or the name of a tiktoken encoding.

    Attributes:
        path: path of the file, or the name of the tiktoken encoding as a path.
        vocab_size: number of ids in the vocabulary.
        eod: id of the end-of-document token.
        sha256: SHA-256 hash of the file, or of the name and vocabulary of a tiktoken encoding.
        unknown: id that stands for text which no piece covers, or None if such text is encoded as bytes.
        control_symbols: spellings of the control symbols, to whose ids no text is encoded.
        is_word_local: whether each line and word of a text is encoded independently, so that the ids of a text are the
            concatenated ids of its words. The spaces before a word are part of the word.

    Raises:
        UserError: the file is missing, is not a tokenizer, or has no end-of-document token.
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
        return Tokenizer, (self.path,)  # a tokenizer is pickled as its path, and the other process loads the file

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, which never include `eod`. Lone surrogates are encoded as U+FFFD.

        With a word-local tokenizer, the lines of the text are encoded separately. The ids are the same, but encoding a
        long document is several times faster, because SentencePiece's BPE slows down with the length of its input.
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
        """Return the token ids of each text, without splitting the texts. They must not contain lone surrogates."""
        return self._backend.encode_all(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, in which `eod` is omitted. Raises UserError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UserError(
                f"token ids {min(ids)} to {max(ids)} do not fit the vocabulary of {self.vocab_size}",
                str(self.path),
                "use the tokenizer that the tokens were made with",
            )
        return self._backend.decode(ids)


def _load_backend(path: Path) -> TokenizerBackend:
    """Load a tokenizer file, whose type is detected from its content.

    If there is no such file, load the tiktoken encoding with this name.
    """
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
    """Train a lossless SentencePiece BPE model, and write it to `output_prefix`.model.

    The training text is sampled from the whole input by hashes. Memory is therefore bounded (about 10 bytes per byte of
    the sample), and the same texts always result in the same model.

    Args:
        documents: texts to train on.
        vocab_size: size of the vocabulary, including special tokens.
        output_prefix: path of the model without `.model`.
        sample_bytes: maximum bytes of text to train on.

    Returns:
        The path of the model.

    Raises:
        UserError: there is no text, or the vocabulary is too small or too large for the text.
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
            # The limit is in bytes. Longer lines would be skipped, but no line has more than 2,000 characters.
            max_sentence_length=8192,
            num_threads=1,
            minloglevel=2,  # print only errors to the console
            **_LOSSLESS,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from None
    return _publish(model.getvalue(), Path(f"{os.fspath(output_prefix)}.model"))


def sample_lines(documents: Iterable[str], sample_bytes: int) -> list[str]:
    """Sample lines by the hash of their index (see `BoundedSample`).

    Returns lines of at most `sample_bytes` bytes in total, in input order.
    """
    sample = BoundedSample(sample_bytes)
    for index, line in enumerate(line for text in documents for line in training_lines(without_surrogates(text))):
        sample.add((0, index), line)
    return sample.texts()


def training_lines(text: str) -> Iterator[str]:
    """Yield the non-blank lines of a text, to train on. Lines of more than 2,000 characters are split."""
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
    """Write a file under a temporary name, and rename it when it is complete. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
