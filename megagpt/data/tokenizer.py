"""Text to token ids and back without loss: a sentencepiece model, and how one is trained."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from megagpt.data.other_tokenizers import HuggingFaceTokenizer, Vocabulary, tiktoken_encoding
from megagpt.data.sample import BoundedSample
from megagpt.data.sentencepiece_model import EOD_PIECE, NEWLINE_ID, SentencepieceModel
from megagpt.errors import UserError

SAMPLE_BYTES = 20_000_000  # more text no longer changes the merges that matter
_PIECE = re.compile(r"[^\n]{1,2000}(?=[ \n]|\Z)|[^\n]{1,2000}")  # a line, or a stretch of it that ends at a blank
_SURROGATE = re.compile("[\ud800-\udfff]")

# What makes the round trip exact: bytes for rare characters, no normalisation, no blank added or removed,
# and the newline as a symbol of its own, which no merge crosses.
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
    """Give `text` with U+FFFD for every lone surrogate, so that it has a UTF-8 form."""
    return text if _is_unicode(text) else replace_surrogates(text)[0]


def replace_surrogates(text: str) -> tuple[str, int]:
    """Put U+FFFD for every lone surrogate of `text`, and count them."""
    return _SURROGATE.subn("\ufffd", text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Tokenizer:
    """A sentencepiece model, a `tokenizer.json` of Hugging Face's, or one of tiktoken's encodings by its name.

    `vocab_size` counts ids, `eod` is the id that ends a document, `sha256` is the hash of the file. `unknown` is the
    id of what no piece is for (None: bytes spell it out). `control_symbols` are the spellings of ids that no text
    gives. `by_words`: a text's ids are those of its lines and words, blanks going with the word behind them.
    Raises UserError when the file is missing, is no tokenizer, or has no end-of-document symbol.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._vocabulary = vocabulary = _vocabulary(self.path)
        self.sha256, self.vocab_size = vocabulary.sha256, vocabulary.vocab_size
        self.eod, self.unknown = vocabulary.eod, vocabulary.unknown
        self.control_symbols, self.by_words = vocabulary.control_symbols, vocabulary.by_words

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path]]:
        return Tokenizer, (self.path,)  # another process opens the file for itself

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, never `eod`; lone surrogates count as U+FFFD.

        The text is cut at newlines where that gives the same ids as the whole: it is several times faster
        on long documents, since sentencepiece's BPE slows down with the length of its input.
        """
        text = without_surrogates(text)
        if not self.by_words:
            return self.encode_all([text])[0]
        first, *others = self.encode_all(text.split("\n"))
        ids = first
        for line in others:
            ids.append(NEWLINE_ID)
            ids += line
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, taken whole. The texts hold no lone surrogates."""
        return self._vocabulary.encode_all(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; `eod` gives nothing. Raises UserError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UserError(
                f"token ids {min(ids)} to {max(ids)} do not fit the vocabulary of {self.vocab_size}",
                str(self.path),
                "use the tokenizer that the tokens were made with",
            )
        return self._vocabulary.decode(ids)


def _vocabulary(path: Path) -> Vocabulary:
    """The tokenizer of a file, by its content; or of a name, where there is no such file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and (encoding := tiktoken_encoding(str(path))):
            return encoding
        do = "make one with `megagpt tokenizer train`, or correct the path"
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
    """Train a lossless BPE model of `vocab_size` ids on the texts and write `output_prefix`.model.

    At most `sample_bytes` bytes of text are used, taken by hash over the whole input, so memory is bounded
    (about 10 bytes a byte of the sample) and the same texts give the same file.
    Raises UserError when there is no text or the vocabulary is too small or too large for it.
    """
    pieces = sample_pieces(documents, sample_bytes)
    if not pieces:
        raise UserError(
            "no text to train a tokenizer on",
            "",
            "give files that hold text (in JSON lines or a table under --text-key), or `default`",
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            max_sentence_length=8192,  # bytes, of 2,000 characters at most; longer ones would be skipped
            num_threads=1,
            minloglevel=2,  # warnings and information stay off the console
            **_LOSSLESS,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from None
    return _publish(model.getvalue(), Path(f"{os.fspath(output_prefix)}.model"))


def sample_pieces(documents: Iterable[str], sample_bytes: int) -> list[str]:
    """Lines of the texts, drawn by the hashes of their places (see `Sample`), `sample_bytes` in all, in their order."""
    sample = BoundedSample(sample_bytes)
    for place, line in enumerate(line for text in documents for line in lines_of(without_surrogates(text))):
        sample.add((0, place), line)
    return sample.texts()


def lines_of(text: str) -> Iterator[str]:
    """What is learned from a text: lines that are not blank, at most 2,000 characters each."""
    for match in _PIECE.finditer(text):
        if not match[0].isspace():
            yield match[0]


def _training_error(message: str, vocab_size: int) -> UserError:
    """Say in the user's words what sentencepiece found wrong with the size of the vocabulary."""
    if limit := re.search(r"set it to a value <= (\d+)", message):
        do = f"ask for at most {limit[1]}, or give more text"
        return UserError(f"a vocabulary of {vocab_size} is too large for this text", "--vocab-size", do)
    if limit := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        do = f"ask for at least {limit[1]}: the bytes and the characters of this text need that many"
        return UserError(f"a vocabulary of {vocab_size} is too small for this text", "--vocab-size", do)
    return UserError(f"sentencepiece could not train: {message}", "", "see what the input holds")


def _publish(content: bytes, path: Path) -> Path:
    """Write the file under a temporary name and rename it when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
