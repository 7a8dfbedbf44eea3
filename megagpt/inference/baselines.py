"""Baselines for bits per byte, measured with methods without a neural network on the same validation text."""

from __future__ import annotations

import lzma
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megagpt.corpus.reader import CorpusReader
from megagpt.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Baselines:
    """Bits per byte that other methods achieve on the validation text.

    Attributes:
        unigram: bits per byte if each token is predicted by its frequency in the training text.
        xz: bits per byte if xz compresses only the validation text.
        xz_after_training: bits per byte if xz first compresses the training text, which the model has also read. Only
            the additional size due to the validation text is counted.
    """

    unigram: float
    xz: float
    xz_after_training: float


def measure_baselines(train: CorpusReader, validation: CorpusReader, tokenizer: Tokenizer) -> Baselines:
    """Measure all baselines. The training text is compressed twice, which takes seconds per 10 MB.

    Args:
        train: corpus that the model was trained on.
        validation: corpus on which the baselines are measured.
        tokenizer: tokenizer of both corpora.

    Returns:
        The baselines in bits per byte.
    """
    training_text, text = (_text(corpus, tokenizer) for corpus in (train, validation))
    with ThreadPoolExecutor() as pool:  # lzma releases the GIL
        alone, before, both = pool.map(_compressed_bytes, (text, training_text, training_text + text))
    bits = 8 / len(text)
    return Baselines(_unigram(train, validation, len(text)), alone * bits, (both - before) * bits)


def _unigram(train: CorpusReader, validation: CorpusReader, text_bytes: int) -> float:
    """Return the cross-entropy of the validation tokens under a unigram model, in bits per byte.

    The model consists of the token frequencies in the training corpus, with add-one smoothing. Padding in a packed
    training corpus is not counted.
    """
    size = max(int(train.tokens.max()), int(validation.tokens.max())) + 1
    counts = np.bincount(train.tokens, minlength=size) + 1.0
    if train.sidecar:
        counts[train.sidecar.eod] -= train.sidecar.padding
    nats = -np.log(counts / counts.sum())[validation.tokens].sum()
    return float(nats) / math.log(2) / text_bytes


def _compressed_bytes(text: bytes) -> int:
    """Return the size of a text compressed by `xz -9e`. Its window of 64 MiB holds the whole default corpus."""
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def _text(corpus: CorpusReader, tokenizer: Tokenizer) -> bytes:
    """Decode the text of a corpus. The result is exact because the tokenizer is lossless."""
    documents = (corpus.document(index) for index in range(len(corpus.documents) - 1))
    return "".join(tokenizer.decode(document.tolist()) for document in documents).encode()
