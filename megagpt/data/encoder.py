"""Texts to the bytes of .bin, several times faster than sentencepiece alone: words met before are remembered."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence

from megagpt.data.indexed import dtype_of
from megagpt.data.tokenizer import Tokenizer

# No piece of a tokenizer "by words" goes past the end of one of these: a line's end, a word with the blanks before it.
_WORD = re.compile("\n|[ \u2581]*[^ \u2581\n]+|[ \u2581]+")
_LONGEST = 32  # characters of a word that is worth remembering
_MOST = 1 << 18  # words remembered: some 60 MB


class Encoder:
    """Encodes with a tokenizer into ids of the type of .bin, little-endian.

    Where the tokenizer works by words (see `Tokenizer.by_words`), a text's ids are those of its words, which makes
    the memo exact. `width` is the bytes of an id.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.width = dtype_of(tokenizer.vocab_size).itemsize
        self._code = "H" if self.width == 2 else "i"
        self._memo: dict[str, bytes] = {}
        self.end = self._bytes([tokenizer.eod])
        self.by_words = tokenizer.by_words

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of each text, without the end-of-document symbol. The texts hold no lone surrogates."""
        if not self.by_words:
            return self._encoded(texts)
        words = [_WORD.findall(text) for text in texts]
        if len(self._memo) > _MOST:
            self._memo.clear()
        memo = self._memo
        new = list(set().union(*words).difference(memo))
        found = dict(zip(new, self._encoded(new), strict=True))
        memo.update(found)
        encoded = [b"".join([memo[word] for word in text]) for text in words]
        for word in found:
            if len(word) > _LONGEST:
                del memo[word]
        return encoded

    def _encoded(self, texts: Sequence[str]) -> list[bytes]:
        return list(map(self._bytes, self._tokenizer.encode_all(texts)))

    def _bytes(self, ids: Iterable[int]) -> bytes:
        return array(self._code, ids).tobytes()
