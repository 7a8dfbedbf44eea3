"""The engine gigatoken: sentencepiece's ids, many times faster, for the tokenizers that `tokenizer train` makes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagpt.data.encoder import Encoder
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import UserError

_GROWTH = 40 << 20  # bytes of memory that its cache may take, which it never shrinks by itself
_PAGE = os.sysconf("SC_PAGE_SIZE")
_DO = "leave out --engine: sentencepiece encodes with any tokenizer"


class GigatokenEncoder(Encoder):
    """Encodes as `Encoder` does, by another package.

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
        encode, dtype = self._engine.encode, self._dtype
        encoded = [encode(text).astype(dtype).tobytes() for text in texts]
        for symbol in self._tokenizer.control_symbols:
            for number, text in enumerate(texts):
                if symbol in text:
                    (encoded[number],) = super().encode([text])
        return encoded

    def _load(self) -> None:
        """Begin with an empty cache."""
        self._engine: Any = None  # the old one goes first
        self._engine = _opened(self._tokenizer.path)


def check_gigatoken(tokenizer: Tokenizer) -> None:
    """Raise UserError as `GigatokenEncoder` would."""
    if not tokenizer.by_words:
        what = "the engine gigatoken gives sentencepiece's ids only for tokenizers of `megagpt tokenizer train`"
        raise UserError(what, str(tokenizer.path), _DO)
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        what = "the engine gigatoken needs the package gigatoken"
        raise UserError(what, "--engine", 'pip install "megagpt[gigatoken]", or leave out --engine') from None


def _opened(model: Path) -> Any:
    import gigatoken

    try:
        return gigatoken.Tokenizer.from_sentencepiece(model).backend
    except ValueError as error:
        raise UserError(f"the engine gigatoken cannot read the tokenizer: {error}", str(model), _DO) from None


def _resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
