"""The engine gigatoken: sentencepiece's ids, many times faster, for the tokenizers that `tokenizer train` makes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagpt.data.encoder import CachedEncoder
from megagpt.data.sentencepiece_model import EOD_PIECE, bpe_vocab_and_merges
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import UserError

_GROWTH = 40 << 20  # bytes of memory that its cache may take, which it never shrinks by itself
_AS_IT_STANDS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
_END = EOD_PIECE.encode()
_PAGE = os.sysconf("SC_PAGE_SIZE")
_DO = "leave out --engine: sentencepiece encodes with any tokenizer"


class GigatokenEncoder(CachedEncoder):
    """Encodes as `CachedEncoder` does, by another package.

    That makes the ids of control symbols out of their spelling; a text that holds one goes by sentencepiece.
    Raises UserError where the package is missing, or for a tokenizer that it is not known to be exact for: with
    a blank put before a text, for one, its ids are others.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        check_gigatoken(tokenizer)
        self._load()
        self._most = _resident() + _GROWTH

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of each text, without the end-of-document symbol. The texts hold no lone surrogates."""
        if _resident() > self._most:
            self._load()
            # Where the memory did not come back at once, the next time is not the next batch.
            self._most = max(self._most, _resident() + _GROWTH // 4)
        if encoded := self._together(texts):
            return encoded
        return [(self._together([text]) or super(GigatokenEncoder, self).encode([text]))[0] for text in texts]

    def _together(self, texts: Sequence[str]) -> list[bytes] | None:
        """Ids of texts that are encoded in one call, which costs least; None where they spell a control symbol."""
        ended = b"".join([text.encode() + _END for text in texts])
        for symbol in self._tokenizer.control_symbols:
            if ended.count(symbol.encode()) != (len(texts) if symbol == EOD_PIECE else 0):
                return None
        ids = self._engine.encode(ended).astype(self._dtype)
        ends = ((ids == self._tokenizer.eod).nonzero()[0] * self.width).tolist()
        content, begins = ids.tobytes(), [0, *(end + self.width for end in ends)]
        return [content[begin:end] for begin, end in zip(begins, ends, strict=False)]

    def _load(self) -> None:
        """Begin with an empty cache."""
        self._engine: Any = None  # the old one goes first
        self._engine = _opened(self._tokenizer)


def check_gigatoken(tokenizer: Tokenizer) -> None:
    """Raise UserError as `GigatokenEncoder` would."""
    if not tokenizer.is_word_local:
        what = "the engine gigatoken gives sentencepiece's ids only for tokenizers of `megagpt tokenizer train`"
        raise UserError(what, str(tokenizer.path), _DO)
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        what = "the engine gigatoken needs the package gigatoken"
        raise UserError(what, "--engine", 'pip install "megagpt[gigatoken]", or leave out --engine') from None


def _opened(tokenizer: Tokenizer) -> Any:
    """The engine, from what its own reader of .model files would make of one that is "by words", in half the time."""
    import gigatoken

    ids, merges = bpe_vocab_and_merges(tokenizer.path.read_bytes())
    symbols = [{"id": ids[symbol], "content": symbol, **_AS_IT_STANDS} for symbol in (*tokenizer.control_symbols, "\n")]
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    content = {
        "added_tokens": symbols,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "model": model | {"vocab": ids, "merges": merges},
    }
    try:
        return gigatoken.Tokenizer.from_json(json.dumps(content)).backend
    except ValueError as error:
        what = f"the engine gigatoken cannot read the tokenizer: {error}"
        raise UserError(what, str(tokenizer.path), _DO) from None


def _resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
