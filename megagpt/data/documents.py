"""Documents, the fragments that a long one is read in, and which documents are put aside for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

DEFAULT_VALIDATION_FRACTION = 0.04


@dataclass(frozen=True)
class Document:
    """One whole text with the name of the place it came from, such as `books/a.txt`.

    `key` is what the validation split hashes: the text when empty, so that copies of a text stay together
    and a renamed file stays where it was.
    """

    name: str
    text: str
    key: str = ""


class TextFragment(NamedTuple):
    """A stretch of a document's text. The one that ends the document is `last`, and most are its only one.

    `line` counts from 1 where the document is a line of a file; `key` is the document's (see `Document`).
    A document is fragmented only after the end of a line, or after a word before a blank.
    """

    text: str
    last: bool = True
    line: int = 0
    key: str = ""


def join_fragments(fragments: Iterable[TextFragment]) -> Iterator[TextFragment]:
    """Each document as one fragment."""
    begun: list[str] = []
    for fragment in fragments:
        begun.append(fragment.text)
        if fragment.last:
            yield fragment._replace(text="".join(begun))
            begun = []


def text_digest(text: str) -> bytes:
    """Hash of a text or key, 16 bytes."""
    return hashlib.md5(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()


def is_validation(digest: bytes, fraction: float) -> bool:
    """Whether the document with this hash belongs to the validation part that takes `fraction` of all documents.

    Decided by the hash alone: adding documents moves none, a larger fraction keeps those of a smaller.
    """
    number = int.from_bytes(digest, "big")
    # Twentieths first: at 0.04 (and 0.05) the default corpus gives the 13 documents on which our figures were measured.
    return (number % 20 + (number // 20 % 2**32) / 2**32) / 20 < fraction
