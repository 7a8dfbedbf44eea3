"""The engine gigatoken, a fast encoder for tokenizers that were trained by `megagpt tokenizer train`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagpt.errors import UserError
from megagpt.tokenizer.cached_encoder import CachedEncoder
from megagpt.tokenizer.sentencepiece_model import EOD_PIECE, bpe_vocab_and_merges
from megagpt.tokenizer.tokenizer import Tokenizer

# Number of bytes by which gigatoken's cache may grow before it is emptied. The cache never shrinks by itself.
_CACHE_GROWTH = 40 << 20
_PLAIN_TOKEN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
_EOD = EOD_PIECE.encode()
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_DO = "leave out --engine: SentencePiece encodes with any tokenizer"


class GigatokenEncoder(CachedEncoder):
    """Encoder that uses the package gigatoken and returns the same bytes as `CachedEncoder`.

    gigatoken converts the spelling of a control symbol to the id of the symbol. Texts that contain such a spelling are
    therefore encoded by SentencePiece.

    Raises:
        UserError: gigatoken is not installed, or the tokenizer is not word-local. With other tokenizers, gigatoken's
            ids can differ from SentencePiece's, for example if the tokenizer adds a space before the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        check_gigatoken(tokenizer)
        self._reset_engine()
        self._memory_limit = _resident_bytes() + _CACHE_GROWTH

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text, without the end-of-document token. Texts must not contain lone surrogates."""
        if _resident_bytes() > self._memory_limit:
            self._reset_engine()
            # The memory may not be returned to the system immediately. Avoid another reset at the next batch.
            self._memory_limit = max(self._memory_limit, _resident_bytes() + _CACHE_GROWTH // 4)
        if encoded := self._encode_in_one_call(texts):
            return encoded
        by_sentencepiece = super().encode
        return [(self._encode_in_one_call([text]) or by_sentencepiece([text]))[0] for text in texts]

    def _encode_in_one_call(self, texts: Sequence[str]) -> list[bytes] | None:
        """Encode all texts in a single call, which is fastest.

        Returns the ids of each text, or None if a text contains the spelling of a control symbol.
        """
        joined = b"".join([text.encode() + _EOD for text in texts])
        for symbol in self._tokenizer.control_symbols:
            if joined.count(symbol.encode()) != (len(texts) if symbol == EOD_PIECE else 0):
                return None
        ids = self._engine.encode(joined).astype(self._dtype)
        ends = ((ids == self._tokenizer.eod).nonzero()[0] * self.width).tolist()
        content = ids.tobytes()
        starts = [0, *(end + self.width for end in ends)]
        return [content[start:end] for start, end in zip(starts, ends, strict=False)]

    def _reset_engine(self) -> None:
        """Replace the engine with a new one, whose cache is empty."""
        self._engine: Any = None  # this releases the memory of the old engine first
        self._engine = _build_engine(self._tokenizer)


def check_gigatoken(tokenizer: Tokenizer) -> None:
    """Raise UserError if `GigatokenEncoder` cannot be used with this tokenizer."""
    if not tokenizer.is_word_local:
        what = "the engine gigatoken matches SentencePiece's ids only for tokenizers of `megagpt tokenizer train`"
        raise UserError(what, str(tokenizer.path), _DO)
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        what = "the engine gigatoken needs the package gigatoken"
        raise UserError(what, "--engine", 'pip install "megagpt[gigatoken]", or leave out --engine') from None


def _build_engine(tokenizer: Tokenizer) -> Any:
    """Build gigatoken's engine for a word-local SentencePiece model.

    The result is the same as that of gigatoken's reader of .model files, in half the time.
    """
    import gigatoken

    ids, merges = bpe_vocab_and_merges(tokenizer.path.read_bytes())
    symbols = [{"id": ids[symbol], "content": symbol, **_PLAIN_TOKEN} for symbol in (*tokenizer.control_symbols, "\n")]
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


def _resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
