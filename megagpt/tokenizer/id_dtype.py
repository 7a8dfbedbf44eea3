"""The integer type in which token ids are stored, depending on the size of the vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np

_UINT16_VOCAB_LIMIT = 65_500  # the same limit as in Megatron-LM


def bytes_per_token(vocab_size: int) -> int:
    """Return the number of bytes per id in .bin.

    As in Megatron-LM, ids take 2 bytes (uint16) for vocabularies of fewer than 65,500 ids, and otherwise 4 (int32).
    """
    return 2 if vocab_size < _UINT16_VOCAB_LIMIT else 4


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of the ids in .bin. The sizes are those of `bytes_per_token`."""
    return np.dtype("<u2") if bytes_per_token(vocab_size) == 2 else np.dtype("<i4")
