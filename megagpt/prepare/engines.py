"""Tokenizer implementations (engines): sentencepiece, and the faster gigatoken.

At the beginning of every shard, the ids of gigatoken are compared with those of sentencepiece.
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
# Number of characters at the beginning of each shard that are checked. The first text is always checked as a whole.
_CHECKED_CHARACTERS = 1 << 12
_CONTEXT_TOKENS = 8  # number of tokens shown on each side of a difference


def check_engine(engine: str, tokenizer: Tokenizer) -> None:
    """Check that an engine exists, is installed, and can encode with a tokenizer.

    Args:
        engine: The name of the engine.
        tokenizer: The tokenizer.

    Raises:
        UserError: The engine cannot be used.
    """
    if engine not in ENGINES:
        raise UserError(f"there is no engine {engine}", "--engine", f"choose {' or '.join(ENGINES)}")
    if engine == "gigatoken":
        check_gigatoken(tokenizer)


def create_encoder(engine: str, tokenizer: Tokenizer) -> CachedEncoder:
    """Create the encoder of an engine for a tokenizer. `check_engine` must have accepted both."""
    return GigatokenEncoder(tokenizer) if engine == "gigatoken" else CachedEncoder(tokenizer)


class EngineMismatch(LocatedError):
    """Error for an engine that encoded a document differently from sentencepiece.

    Args:
        location: The location of the document.
        engine: The name of the engine.
        actual: The engine's tokens around the first difference, as text.
        expected: The tokens of sentencepiece around the first difference, as text.
    """

    def __init__(self, location: InputLocation, engine: str, actual: str, expected: str) -> None:
        super().__init__(location, engine, actual, expected)
        self._engine, self._actual, self._expected = engine, actual, expected

    def to_user_error(self, where: str) -> UserError:
        """Return the user-facing error. `where` is the location as `file` or `file:line`."""
        what = f"{self._engine} tokenizes a document differently from sentencepiece"
        width = max(len(self._engine), len("sentencepiece")) + 1
        tokens = (("sentencepiece", self._expected), (self._engine, self._actual))
        lines = [f"{name + ':':{width}} {text}" for name, text in tokens]
        do = f"omit --engine, and report this to the developers of {self._engine}; nothing was written"
        return UserError(what, "\n".join([where, *lines]), do)


class EngineCheck:
    """Compares an engine's ids for the first documents of each shard with uncached sentencepiece ids."""

    def __init__(self, engine: str, tokenizer: Tokenizer) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self.start_shard()

    def start_shard(self) -> None:
        """Start a new shard. Its first documents will be compared."""
        self._remaining = 0 if self._engine == "sentencepiece" else _CHECKED_CHARACTERS

    def compare(self, texts: Iterable[str], locations: Iterable[InputLocation], encoded: Iterable[bytes]) -> None:
        """Compare the next texts of the shard, until the checked beginning of the shard ends.

        Args:
            texts: The next texts of the shard.
            locations: The location of each text.
            encoded: The engine's ids of each text, as the bytes of .bin.

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
        """Return the tokens around an index as text, separated by `|` as in `tokenizer inspect`."""
        around = ids[max(0, index - _CONTEXT_TOKENS) : index + _CONTEXT_TOKENS]
        size = self._tokenizer.vocab_size
        texts = [self._tokenizer.decode([number]) if number < size else f"[{number}]" for number in around]
        return "|".join(texts).replace("\n", "⏎")
