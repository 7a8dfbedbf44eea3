"""Incremental UTF-8 decoder that counts invalid sequences, for text files and long JSON lines."""

from __future__ import annotations

import codecs

_REPLACEMENT = "\ufffd"


class Utf8Decoder:
    """Decodes UTF-8 block by block, and replaces each invalid sequence with U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._incomplete = b""  # first bytes of a character that continues in the next block

    def decode(self, block: bytes, final: bool = False) -> tuple[str, int]:
        """Decode the next block.

        Args:
            block: The bytes of the block.
            final: True for the last block. An incomplete character at its end is invalid.

        Returns:
            The decoded text, and the number of invalid sequences that were replaced in it.
        """
        text = self._decoder.decode(block, final)
        raw = self._incomplete + block
        self._incomplete = self._decoder.getstate()[0]
        decoded = raw[: len(raw) - len(self._incomplete)]
        # U+FFFD characters that were already in the input are valid, and are not counted.
        return text, text.count(_REPLACEMENT) - decoded.count(_REPLACEMENT.encode())
