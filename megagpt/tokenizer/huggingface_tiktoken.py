"""Tokenizer backends for Hugging Face's `tokenizer.json` and for tiktoken's encodings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Protocol

from megagpt.errors import UserError

# Names of the end-of-document token in widely used vocabularies, in order of preference.
_EOD_SYMBOLS = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")


class TokenizerBackend(Protocol):
    """Interface that every tokenizer backend provides to `Tokenizer`, which documents the attributes."""

    sha256: str
    vocab_size: int
    eod: int
    unknown: int | None
    control_symbols: tuple[str, ...]
    is_word_local: bool

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text. The result never contains the ids of control symbols."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. Control symbols are omitted."""


class HuggingFaceTokenizer:
    """Tokenizer backend for a `tokenizer.json` file, see `TokenizerBackend`.

    Truncation, padding and the addition of special tokens before or after a text are disabled.

    Args:
        content: content of the file.
        path: path of the file, for error messages.

    Raises:
        UserError: the content is invalid, the package tokenizers is not installed, or the tokenizer has no
            end-of-document token.
    """

    is_word_local = False

    def __init__(self, content: bytes, path: str) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # megagpt's workers are separate processes already
        try:
            import tokenizers
        except ImportError:
            what = "a tokenizer.json needs the package tokenizers"
            raise UserError(what, path, 'pip install "megagpt[tokenizers]"') from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package does not raise a more specific exception
            raise UserError(f"not a Hugging Face tokenizer: {error}", path, "give its tokenizer.json") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # The spelling of a special token is encoded as text. Otherwise a text could end its document.
        self._tokenizer.encode_special_tokens = True
        self.sha256 = hashlib.sha256(content).hexdigest()
        ids: dict[str, int] = self._tokenizer.get_vocab()
        self.vocab_size = max(ids.values()) + 1
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.control_symbols = tuple(token.content for token in added if token.special)
        self.eod = _find_eod(ids, self.control_symbols, path)
        unknown_token: str | None = getattr(self._tokenizer.model, "unk_token", None)
        self.unknown = ids.get(unknown_token) if unknown_token else None

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class TiktokenEncoding:
    """Tokenizer backend for a tiktoken encoding, see `TokenizerBackend`.

    Args:
        name: name of the encoding.

    Raises:
        UserError: the encoding cannot be loaded, or it has no end-of-document token.
    """

    is_word_local = False
    unknown: int | None = None  # every text can be encoded as bytes

    def __init__(self, name: str) -> None:
        import tiktoken

        try:
            self._encoding = tiktoken.get_encoding(name)
        except Exception as error:  # most often a network error
            do = "tiktoken downloads it on first use; set TIKTOKEN_CACHE_DIR on machines without a network"
            raise UserError(f"cannot load this encoding: {error}", name, do) from None
        digest = hashlib.sha256(f"tiktoken {name}".encode())
        for piece in sorted(self._encoding.token_byte_values()):
            digest.update(len(piece).to_bytes(4, "little") + piece)
        self.sha256 = digest.hexdigest()
        self.vocab_size: int = self._encoding.n_vocab
        self.control_symbols = tuple(sorted(self._encoding.special_tokens_set))
        ids = {symbol: self._encoding.encode_single_token(symbol) for symbol in self.control_symbols}
        self.eod = _find_eod(ids, self.control_symbols, name)
        self._special = set(ids.values())

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [self._encoding.encode_ordinary(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return self._encoding.decode([number for number in ids if number not in self._special])


def tiktoken_encoding(name: str) -> TiktokenEncoding | None:
    """Return the tiktoken encoding with this name, or None if tiktoken is not installed or has no such encoding."""
    try:
        import tiktoken
    except ImportError:
        return None
    return TiktokenEncoding(name) if name in tiktoken.list_encoding_names() else None


def _find_eod(ids: dict[str, int], control_symbols: Sequence[str], path: str) -> int:
    """Return the id of the end-of-document token. Raises UserError if no control symbol has one of its usual names."""
    for symbol in _EOD_SYMBOLS:
        if symbol in control_symbols:
            return ids[symbol]
    what = f"the tokenizer has no end-of-document token (none of {', '.join(_EOD_SYMBOLS)})"
    raise UserError(what, path, "choose another tokenizer, or add one of these to its special tokens")
