"""Tokenizers that others trained: `tokenizer.json` of Hugging Face's, and tiktoken's encodings by name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Protocol

from megagpt.errors import UserError

# What the vocabularies in use call their end of a document, the likeliest first.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")


class Vocabulary(Protocol):
    """What `Tokenizer` needs of a tokenizer; see there."""

    sha256: str
    vocab_size: int
    eod: int
    unknown: int | None
    control_symbols: tuple[str, ...]
    is_word_local: bool

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, never those of control symbols."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; that of control symbols is left out."""


class HuggingFaceTokenizer:
    """A `tokenizer.json`. What it adds around a text, cuts off or pads is switched off."""

    is_word_local = False

    def __init__(self, content: bytes, path: str) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # our workers are processes already
        try:
            import tokenizers
        except ImportError:
            what = "a tokenizer.json needs the package tokenizers"
            raise UserError(what, path, 'pip install "megagpt[tokenizers]"') from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises nothing more special
            raise UserError(f"not a tokenizer of Hugging Face's: {error}", path, "give its tokenizer.json") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # as text: a document that spells one is no end
        self.sha256 = hashlib.sha256(content).hexdigest()
        ids: dict[str, int] = self._tokenizer.get_vocab()
        self.vocab_size = max(ids.values()) + 1
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.control_symbols = tuple(token.content for token in added if token.special)
        self.eod = _end(ids, self.control_symbols, path)
        unknown: str | None = getattr(self._tokenizer.model, "unk_token", None)
        self.unknown = ids.get(unknown) if unknown else None

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [one.ids for one in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class TiktokenEncoding:
    """One of tiktoken's encodings."""

    is_word_local = False
    unknown: int | None = None  # bytes spell everything out

    def __init__(self, name: str) -> None:
        import tiktoken

        try:
            self._encoding = tiktoken.get_encoding(name)
        except Exception as error:  # of the network, most of all
            do = "tiktoken fetches it once: see TIKTOKEN_CACHE_DIR for machines without a network"
            raise UserError(f"cannot load this encoding: {error}", name, do) from None
        facts = hashlib.sha256(f"tiktoken {name}".encode())
        for piece in sorted(self._encoding.token_byte_values()):
            facts.update(len(piece).to_bytes(4, "little") + piece)
        self.sha256 = facts.hexdigest()
        self.vocab_size: int = self._encoding.n_vocab
        self.control_symbols = tuple(sorted(self._encoding.special_tokens_set))
        ids = {symbol: self._encoding.encode_single_token(symbol) for symbol in self.control_symbols}
        self.eod = _end(ids, self.control_symbols, name)
        self._special = set(ids.values())

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [self._encoding.encode_ordinary(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids."""
        return self._encoding.decode([number for number in ids if number not in self._special])


def tiktoken_encoding(name: str) -> TiktokenEncoding | None:
    """The encoding of this name; None where tiktoken is not installed or knows no such name."""
    try:
        import tiktoken
    except ImportError:
        return None
    return TiktokenEncoding(name) if name in tiktoken.list_encoding_names() else None


def _end(ids: dict[str, int], control_symbols: Sequence[str], path: str) -> int:
    """The id that ends a document. Raises UserError where none of the usual symbols is among the control symbols."""
    for symbol in _ENDS:
        if symbol in control_symbols:
            return ids[symbol]
    what = f"the tokenizer has no end-of-document symbol (none of {', '.join(_ENDS)})"
    raise UserError(what, path, "choose another, or add one of them to its special tokens")
