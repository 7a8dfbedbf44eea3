"""What encodes: sentencepiece, or an engine that is held against it at the head of every shard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile

import numpy as np

from megagpt.data.encoder import CachedEncoder
from megagpt.data.gigatoken_encoder import GigatokenEncoder, check_gigatoken
from megagpt.data.indexed import token_dtype
from megagpt.data.oddities import AtPlace, Place
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import UserError

ENGINES = ("sentencepiece", "gigatoken")
_CHECKED = 1 << 12  # characters at the head of each shard, and at least its first text
_SHOWN = 8  # tokens shown around a difference


def check_engine(engine: str, tokenizer: Tokenizer) -> None:
    """Raise UserError where there is no such engine, its package is missing, or it is not for this tokenizer."""
    if engine not in ENGINES:
        raise UserError(f"there is no engine {engine}", "--engine", f"choose {' or '.join(ENGINES)}")
    if engine == "gigatoken":
        check_gigatoken(tokenizer)


def encoder_of(engine: str, tokenizer: Tokenizer) -> CachedEncoder:
    """The encoder of a name that has been checked."""
    return GigatokenEncoder(tokenizer) if engine == "gigatoken" else CachedEncoder(tokenizer)


class EngineDiffers(AtPlace):
    """An engine gave a document other ids than sentencepiece: `theirs` and `ours` are the tokens around the first."""

    def __init__(self, place: Place, engine: str, theirs: str, ours: str) -> None:
        super().__init__(place, engine, theirs, ours)
        self._engine, self._theirs, self._ours = engine, theirs, ours

    def told(self, where: str) -> UserError:
        """The error for people."""
        what = f"{self._engine} cuts a document otherwise than sentencepiece does"
        width = max(len(self._engine), len("sentencepiece")) + 1
        cuts = [
            f"{name + ':':{width}} {cut}" for name, cut in (("sentencepiece", self._ours), (self._engine, self._theirs))
        ]
        do = f"leave out --engine, and tell the makers of {self._engine}; nothing was written"
        return UserError(what, "\n".join([where, *cuts]), do)


class EngineCheck:
    """Holds an engine's ids against sentencepiece's own, without its memo, on the first documents of a shard."""

    def __init__(self, engine: str, tokenizer: Tokenizer) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self.begin()

    def begin(self) -> None:
        """A shard begins."""
        self._left = 0 if self._engine == "sentencepiece" else _CHECKED

    def look(self, texts: Iterable[str], places: Iterable[Place], encoded: Iterable[bytes]) -> None:
        """Compare what stands at the head of the shard. Raises EngineDiffers."""
        for text, place, ids in zip(texts, places, encoded, strict=True):
            if self._left <= 0:
                return
            self._left -= len(text) + 1
            ours, theirs = self._tokenizer.encode(text), np.frombuffer(ids, self._dtype).tolist()
            if ours != theirs:
                pairs = zip(ours, theirs, strict=False)
                same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                raise EngineDiffers(place, self._engine, *(self._cut(cut, same) for cut in (theirs, ours)))

    def _cut(self, ids: Sequence[int], at: int) -> str:
        """The tokens around one of them, as `tokenizer inspect` shows them."""
        first, size = max(0, at - _SHOWN), self._tokenizer.vocab_size
        shown = [self._tokenizer.decode([i]) if i < size else f"[{i}]" for i in ids[first : at + _SHOWN]]
        return "|".join(shown).replace("\n", "⏎")
