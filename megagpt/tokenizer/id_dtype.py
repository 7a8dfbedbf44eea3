"""The integer type in which token ids of a vocabulary are stored."""

from __future__ import annotations

from typing import Any

import numpy as np

_UINT16_VOCAB_LIMIT = 65_500  # as in Megatron-LM


def bytes_per_token(vocab_size: int) -> int:
    """Return the bytes per id in .bin: 2 (uint16) for vocabularies below 65,500, else 4 (int32), as in Megatron-LM."""
    return 2 if vocab_size < _UINT16_VOCAB_LIMIT else 4


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of the ids in .bin, see `bytes_per_token`."""
    return np.dtype("<u2") if bytes_per_token(vocab_size) == 2 else np.dtype("<i4")
