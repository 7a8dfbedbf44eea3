"""Tokenizer implementations: sentencepiece, or a faster one whose ids are compared with sentencepiece's.

The comparison covers the beginning of every shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile

import numpy as np

from megagpt.errors import UserError
from megagpt.prepare.input_warnings import InputLocation, LocatedError
from megagpt.tokenizer.cached_encoder import CachedEncoder
from megagpt.tokenizer.gigatoken_encoder import GigatokenEncoder, check_gigatoken
from megagpt.tokenizer.id_dtype import token_dtype
from megagpt.tokenizer.tokenizer import Tokenizer

ENGINES = ("sentencepiece", "gigatoken")
_CHECKED_CHARACTERS = 1 << 12  # at the beginning of each shard; its first text is always checked
_CONTEXT_TOKENS = 8  # tokens shown on each side of a difference


def check_engine(engine: str, tokenizer: Tokenizer) -> None:
    """Check that an engine exists, is installed, and can encode with a tokenizer.

    Args:
        engine: The name of the engine.
        tokenizer: The tokenizer.

    Raises:
        UserError: It cannot be used.
    """
    if engine not in ENGINES:
        raise UserError(f"there is no engine {engine}", "--engine", f"choose {' or '.join(ENGINES)}")
    if engine == "gigatoken":
        check_gigatoken(tokenizer)


def create_encoder(engine: str, tokenizer: Tokenizer) -> CachedEncoder:
    """Create the encoder of an engine, which has passed `check_engine`, for a tokenizer."""
    return GigatokenEncoder(tokenizer) if engine == "gigatoken" else CachedEncoder(tokenizer)


class EngineMismatch(LocatedError):
    """An engine encoded a document differently from sentencepiece.

    Args:
        location: The document.
        engine: The name of the engine.
        actual: The engine's tokens around the first difference, as text.
        expected: The same of sentencepiece.
    """

    def __init__(self, location: InputLocation, engine: str, actual: str, expected: str) -> None:
        super().__init__(location, engine, actual, expected)
        self._engine, self._actual, self._expected = engine, actual, expected

    def to_user_error(self, where: str) -> UserError:
        """Return the error for the user; `where` is the location as `file` or `file:line`."""
        what = f"{self._engine} tokenizes a document differently from sentencepiece"
        width = max(len(self._engine), len("sentencepiece")) + 1
        tokens = (("sentencepiece", self._expected), (self._engine, self._actual))
        lines = [f"{name + ':':{width}} {text}" for name, text in tokens]
        do = f"omit --engine, and report this to the developers of {self._engine}; nothing was written"
        return UserError(what, "\n".join([where, *lines]), do)


class EngineCheck:
    """Compares an engine's ids for the first documents of each shard with sentencepiece's own, without its cache."""

    def __init__(self, engine: str, tokenizer: Tokenizer) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self.start_shard()

    def start_shard(self) -> None:
        """Start a new shard, whose first documents are compared."""
        self._remaining = 0 if self._engine == "sentencepiece" else _CHECKED_CHARACTERS

    def compare(self, texts: Iterable[str], locations: Iterable[InputLocation], encoded: Iterable[bytes]) -> None:
        """Compare the next texts of the shard, as long as they are at its beginning.

        Args:
            texts: The texts.
            locations: The location of each text.
            encoded: The engine's ids of each text, as they are stored.

        Raises:
            EngineMismatch: The ids differ.
        """
        for text, location, ids in zip(texts, locations, encoded, strict=True):
            if self._remaining <= 0:
                return
            self._remaining -= len(text) + 1
            expected = self._tokenizer.encode(text)
            actual = np.frombuffer(ids, self._dtype).tolist()
            if expected != actual:
                pairs = zip(expected, actual, strict=False)
                index = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                raise EngineMismatch(
                    location, self._engine, self._format_tokens(actual, index), self._format_tokens(expected, index)
                )

    def _format_tokens(self, ids: Sequence[int], index: int) -> str:
        """Return the tokens around an index as text, separated as by `tokenizer inspect`."""
        around = ids[max(0, index - _CONTEXT_TOKENS) : index + _CONTEXT_TOKENS]
        size = self._tokenizer.vocab_size
        texts = [self._tokenizer.decode([number]) if number < size else f"[{number}]" for number in around]
        return "|".join(texts).replace("\n", "⏎")
