"""UTF-8 that comes in blocks, as text."""

from __future__ import annotations

import codecs

_REPLACEMENT = "\ufffd"


class Utf8Decoder:
    """Decodes block after block, with U+FFFD in place of what is no UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._half = b""  # of a character that the last block ended in

    def decode(self, block: bytes, final: bool = False) -> tuple[str, int]:
        """The text so far, and how many places of it were no UTF-8."""
        text = self._decoder.decode(block, final)
        raw, self._half = self._half + block, self._decoder.getstate()[0]
        meant = raw[: len(raw) - len(self._half)].count(_REPLACEMENT.encode())
        return text, text.count(_REPLACEMENT) - meant
