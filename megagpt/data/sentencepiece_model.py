"""A sentencepiece model, and when its ids can be had word by word."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import sentencepiece

from megagpt.errors import UserError

EOD_PIECE = "<eod>"
NEWLINE_ID = 2  # after <unk> and <eod>: where our settings put it
_PAST_A_WORD = re.compile("[^\u2581]\u2581|\n")
_UNCHANGED = "  ﬁ ½\t e\u0301  \n end "  # a text that comes back only without normalisation


class SentencepieceModel:
    """The facts and calls that `Tokenizer` has, from the bytes of a .model file."""

    def __init__(self, model: bytes, path: str) -> None:
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = _load(model, path)
        self.vocab_size: int = self._processor.vocab_size()
        self.eod: int = self._processor.eos_id()
        if self.eod < 0:
            raise UserError(
                "the tokenizer has no end-of-document symbol (sentencepiece's eos)",
                path,
                "train one with `megagpt tokenizer train`, or choose a model that has an eos piece",
            )
        unknown: int = self._processor.unk_id()
        self.unknown = None if self._processor.is_byte(self._processor.piece_to_id("<0x00>")) else unknown
        pieces: list[str] = self._processor.id_to_piece(list(range(self.vocab_size)))
        self.control_symbols = tuple(piece for i, piece in enumerate(pieces) if self._processor.is_control(i))
        self.is_word_local = self._is_by_words(pieces)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        encoded: list[list[int]] = self._processor.encode(list(texts), num_threads=1)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids."""
        return str(self._processor.decode(list(ids)))

    def _is_by_words(self, pieces: Sequence[str]) -> bool:
        """Whether a text's ids are those of its lines and words, blanks going with the word behind them.

        So it is with our settings, which the head of the vocabulary shows: no piece goes on past a word or over
        a line's end, and BPE (whose scores count down from 0) merges only what makes a piece.
        """
        model = self._processor
        every = list(range(self.vocab_size))
        kinds = zip(model.is_control(every), model.is_unknown(every), model.is_byte(every), strict=True)
        merges = [
            i for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)) if piece != "\n" and not any(kind)
        ]
        return (
            (pieces[:3], self.eod) == (["<unk>", EOD_PIECE, "\n"], 1)
            and not any(map(_PAST_A_WORD.search, [pieces[i] for i in merges]))
            and not any(model.is_unused(merges))
            and model.get_score(merges) == [-float(n) for n in range(len(merges))]
            and model.encode("\n") == [NEWLINE_ID]  # no blank is put before a text
            and model.decode(model.encode(_UNCHANGED)) == _UNCHANGED
        )


def bpe_vocab_and_merges(model: bytes) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The id of each piece of a BPE model; and which two pieces make one, in the order in which it would make them."""
    read = sentencepiece.SentencePieceProcessor(model_proto=model)
    every = list(range(read.vocab_size()))
    ids = dict(zip(read.id_to_piece(every), every, strict=True))
    made = (piece for piece, number in ids.items() if not (read.is_byte(number) or read.is_control(number)))
    halves = ((piece[:at], piece[at:]) for piece in made for at in range(1, len(piece)))
    return ids, [(left, right) for left, right in halves if left in ids and right in ids]


def _load(model: bytes, path: str) -> Any:
    error = UserError("not a sentencepiece model", path, "give the .model file that `tokenizer train` wrote")
    if not model:
        raise error  # sentencepiece would take it and print to the console later
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError):
        raise error from None
