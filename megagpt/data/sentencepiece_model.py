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
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        self.control_symbols = tuple(piece for i, piece in enumerate(pieces) if self._processor.is_control(i))
        self.by_words = self._is_by_words(pieces)

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
        every = range(self.vocab_size)
        others = {*filter(model.is_control, every), *filter(model.is_unknown, every), *filter(model.is_byte, every)}
        merges = [i for i in every if i not in others and pieces[i] != "\n"]
        return (
            pieces[:3] == ["<unk>", EOD_PIECE, "\n"]
            and not any(map(_PAST_A_WORD.search, [pieces[i] for i in merges]))
            and not any(map(model.is_unused, merges))
            and list(map(model.get_score, merges)) == [-float(n) for n in range(len(merges))]
            and model.encode("\n") == [NEWLINE_ID]  # no blank is put before a text
            and model.decode(model.encode(_UNCHANGED)) == _UNCHANGED
        )


def _load(model: bytes, path: str) -> Any:
    error = UserError("not a sentencepiece model", path, "give the .model file that `tokenizer train` wrote")
    if not model:
        raise error  # sentencepiece would take it and print to the console later
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError):
        raise error from None
