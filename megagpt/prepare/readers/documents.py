"""Documents, the fragments in which long documents are read, and the train/validation split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

DEFAULT_VALIDATION_FRACTION = 0.04


@dataclass(frozen=True)
class Document:
    """A complete text and the name of its source, such as `books/a.txt`.

    The validation split hashes `key`, or the text if `key` is empty. Copies of a text therefore land in the same part,
    and a renamed file stays in its part.
    """

    name: str
    text: str
    key: str = ""


class TextFragment(NamedTuple):
    """Consecutive part of a document's text. Most documents consist of a single fragment.

    `is_last` marks the fragment that ends the document. `line` is the line number, counted from 1, if the document is a
    line or row of a file, and 0 otherwise. `key` is the document's key (see `Document`). Documents are split only after
    a newline, or between a word and the space that follows it.
    """

    text: str
    is_last: bool = True
    line: int = 0
    key: str = ""


def join_fragments(fragments: Iterable[TextFragment]) -> Iterator[TextFragment]:
    """Join the fragments of each document, and yield every document as a single fragment."""
    texts: list[str] = []
    for fragment in fragments:
        texts.append(fragment.text)
        if fragment.is_last:
            yield fragment._replace(text="".join(texts))
            texts = []


def text_digest(text: str) -> bytes:
    """Return the 16-byte MD5 hash of a text or key, which decides its part of the split."""
    return hashlib.md5(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()


def is_validation(digest: bytes, fraction: float) -> bool:
    """Return True if the document with this hash belongs to the validation part.

    The decision depends on the hash alone: adding documents moves no other document between the parts, and a larger
    fraction keeps every document of a smaller one.

    Args:
        digest: The 16-byte hash of the document's key or text.
        fraction: The fraction of all documents that are used for validation, from 0 to 1.
    """
    number = int.from_bytes(digest, "big")
    # The number is reduced modulo 20 first, so that fractions of 0.04 and 0.05 select the 13 documents of the default
    # corpus on which the published figures were measured.
    return (number % 20 + (number // 20 % 2**32) / 2**32) / 20 < fraction
