"""SentencePiece models, and a test that determines whether a model encodes each word independently of its neighbors."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import sentencepiece

from megagpt.errors import UserError

EOD_PIECE = "<eod>"
NEWLINE_ID = 2  # id of the newline in tokenizers trained by megagpt, after <unk> and <eod>
_CROSSES_WORD = re.compile("[^\u2581]\u2581|\n")
_ROUND_TRIP_TEXT = "  ﬁ ½\t e\u0301  \n end "  # text that only a model without normalization leaves unchanged


class SentencepieceModel:
    """Tokenizer backend for a SentencePiece .model file, see `TokenizerBackend`.

    Args:
        model: content of the file.
        path: path of the file, for error messages.

    Raises:
        UserError: the content is not a SentencePiece model, or the model has no end-of-document token.
    """

    def __init__(self, model: bytes, path: str) -> None:
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = _load(model, path)
        self.vocab_size: int = self._processor.vocab_size()
        self.eod: int = self._processor.eos_id()
        if self.eod < 0:
            raise UserError(
                "the tokenizer has no end-of-document token (SentencePiece's eos)",
                path,
                "train one with `megagpt tokenizer train`, or choose a model that has an eos piece",
            )
        unknown: int = self._processor.unk_id()
        has_byte_fallback = self._processor.is_byte(self._processor.piece_to_id("<0x00>"))
        self.unknown = None if has_byte_fallback else unknown
        pieces: list[str] = self._processor.id_to_piece(list(range(self.vocab_size)))
        self.control_symbols = tuple(piece for i, piece in enumerate(pieces) if self._processor.is_control(i))
        self.is_word_local = self._find_is_word_local(pieces)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        encoded: list[list[int]] = self._processor.encode(list(texts), num_threads=1)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(self._processor.decode(list(ids)))

    def _find_is_word_local(self, pieces: Sequence[str]) -> bool:
        """Determine whether the model is word-local, see `Tokenizer.is_word_local`.

        A model is word-local if it was trained with megagpt's settings (recognized by its first pieces), no piece
        crosses the end of a word or line, and every BPE merge produces a piece (recognized by scores that count down
        from 0). The model must neither add a space before a text nor normalize it.
        """
        model = self._processor
        if (pieces[:3], self.eod) != (["<unk>", EOD_PIECE, "\n"], 1):
            return False
        ids = list(range(self.vocab_size))
        special = zip(model.is_control(ids), model.is_unknown(ids), model.is_byte(ids), strict=True)
        merges = [
            i for i, (piece, flags) in enumerate(zip(pieces, special, strict=True)) if piece != "\n" and not any(flags)
        ]
        if any(_CROSSES_WORD.search(pieces[i]) for i in merges):
            return False
        if any(model.is_unused(merges)) or model.get_score(merges) != [-float(n) for n in range(len(merges))]:
            return False
        adds_space_before_text = model.encode("\n") != [NEWLINE_ID]
        normalizes = model.decode(model.encode(_ROUND_TRIP_TEXT)) != _ROUND_TRIP_TEXT
        return not adds_space_before_text and not normalizes


def bpe_vocab_and_merges(model: bytes) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges of a SentencePiece BPE model, for other BPE libraries.

    Args:
        model: content of the .model file.

    Returns:
        The id of each piece, and the pairs of pieces that are merged, in SentencePiece's order of merges.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    all_ids = list(range(processor.vocab_size()))
    ids = dict(zip(processor.id_to_piece(all_ids), all_ids, strict=True))
    merges = []
    for piece, number in ids.items():
        if processor.is_byte(number) or processor.is_control(number):
            continue
        for split in range(1, len(piece)):
            left, right = piece[:split], piece[split:]
            if left in ids and right in ids:
                merges.append((left, right))
    return ids, merges


def _load(model: bytes, path: str) -> Any:
    error = UserError("not a SentencePiece model", path, "give the .model file that `megagpt tokenizer train` wrote")
    if not model:
        raise error  # sentencepiece would accept an empty model and print errors to the console later
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError):
        raise error from None
