"""Text to token ids and back without loss: a sentencepiece model, and how one is trained."""

from __future__ import annotations

import hashlib
import heapq
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from megagpt.errors import UserError

EOD_PIECE = "<eod>"
_NEWLINE_ID = 2  # after <unk> and <eod>: where the settings below put it
_SAMPLE_BYTES = 20_000_000  # more text no longer changes the merges that matter
_PIECE = re.compile(r"[^\n]{1,2000}(?=[ \n]|\Z)|[^\n]{1,2000}")  # a line, or a stretch of it that ends at a blank
_SURROGATE = re.compile("[\ud800-\udfff]")
_PAST_A_WORD = re.compile("[^\u2581]\u2581|\n")
_UNCHANGED = "  ﬁ ½\t e\u0301  \n end "  # a text that comes back only without normalisation

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
    """A sentencepiece model that is read from a file.

    `vocab_size` counts ids, `eod` is the id that ends a document, `sha256` is the hash of the file. `unknown` is the
    id of what no piece is for (None: bytes spell it out). `control_symbols` are the spellings of ids that no text
    gives. `by_words`: see `_is_by_words`.
    Raises UserError when the file is missing, is no sentencepiece model, or has no end-of-document symbol.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        model = self._read()
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = self._load(model)
        self.vocab_size: int = self._processor.vocab_size()
        self.eod: int = self._processor.eos_id()
        if self.eod < 0:
            raise UserError(
                "the tokenizer has no end-of-document symbol (sentencepiece's eos)",
                str(self.path),
                "train one with `megagpt tokenizer train`, or choose a model that has an eos piece",
            )
        unknown: int = self._processor.unk_id()
        self.unknown = None if self._processor.is_byte(self._processor.piece_to_id("<0x00>")) else unknown
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        self.control_symbols = tuple(piece for i, piece in enumerate(pieces) if self._processor.is_control(i))
        self.by_words = self._is_by_words(pieces)

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
            ids.append(_NEWLINE_ID)
            ids += line
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, taken whole. The texts hold no lone surrogates."""
        encoded: list[list[int]] = self._processor.encode(list(texts), num_threads=1)
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; `eod` gives nothing. Raises UserError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UserError(
                f"token ids {min(ids)} to {max(ids)} do not fit the vocabulary of {self.vocab_size}",
                str(self.path),
                "use the tokenizer that the tokens were made with",
            )
        return str(self._processor.decode(ids))

    def _is_by_words(self, pieces: Sequence[str]) -> bool:
        """Whether a text's ids are those of its lines and words, blanks going with the word behind them.

        So it is with our settings, which the head of the vocabulary shows: no piece goes on past a word or over
        a line's end, and BPE (whose scores count down from 0) merges only what makes a piece.
        """
        kinds = (self._processor.is_control, self._processor.is_unknown, self._processor.is_byte)
        plain = [i for i in range(self.vocab_size) if not any(kind(i) for kind in kinds)]
        merges = [i for i in plain if pieces[i] != "\n"]
        return (
            pieces[:3] == ["<unk>", EOD_PIECE, "\n"]
            and not any(_PAST_A_WORD.search(pieces[i]) for i in merges)
            and not any(self._processor.is_unused(i) for i in merges)
            and [self._processor.get_score(i) for i in merges] == [-float(n) for n in range(len(merges))]
            and self._processor.encode("\n") == [_NEWLINE_ID]  # no blank is put before a text
            and self._processor.decode(self._processor.encode(_UNCHANGED)) == _UNCHANGED
        )

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            do = "make one with `megagpt tokenizer train`, or correct the path"
            raise UserError(f"cannot read the tokenizer: {error.strerror}", str(self.path), do) from None

    def _load(self, model: bytes) -> Any:
        error = UserError(
            "not a sentencepiece model", str(self.path), "give the .model file that `tokenizer train` wrote"
        )
        if not model:
            raise error  # sentencepiece would take it and print to the console later
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError):
            raise error from None


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    output_prefix: str | os.PathLike[str],
    sample_bytes: int = _SAMPLE_BYTES,
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
            "give files that hold text (.txt, .md, .jsonl), or `default`",
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
    """Lines of the texts, at most 2,000 characters each and `sample_bytes` in all, in their order.

    Each piece draws a number from the hash of its place; the smallest numbers stay. So the sample is spread
    over the whole input, whose length need not be known, and depends on nothing else.
    """
    kept: list[tuple[int, int, str]] = []
    size = 0
    for place, piece in enumerate(_pieces(documents)):
        digest = hashlib.blake2b(place.to_bytes(8, "little"), digest_size=8).digest()
        heapq.heappush(kept, (-int.from_bytes(digest, "little"), place, piece))
        size += len(piece.encode())
        while size > sample_bytes:
            size -= len(heapq.heappop(kept)[2].encode())
    return [piece for _, _, piece in sorted(kept, key=lambda item: item[1])]


def _pieces(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        for match in _PIECE.finditer(without_surrogates(text)):
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
