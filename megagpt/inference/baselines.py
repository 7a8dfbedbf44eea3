"""Baselines for bits per byte: what methods without a neural network achieve on the same validation text."""

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
    """Bits per byte of the validation text by other methods.

    Attributes:
        unigram: predicts each token by its frequency in the training text.
        xz: compresses the validation text alone with xz.
        xz_after_training: compresses the training text first, which the model has read too, then the validation text.
    """

    unigram: float
    xz: float
    xz_after_training: float


def measure_baselines(train: CorpusReader, validation: CorpusReader, tokenizer: Tokenizer) -> Baselines:
    """Measure all baselines. The training text is compressed twice, which takes seconds per 10 MB.

    Args:
        train: corpus that the model was trained on.
        validation: corpus to predict.
        tokenizer: tokenizer of both.
    """
    training_text, text = (_text(corpus, tokenizer) for corpus in (train, validation))
    with ThreadPoolExecutor() as pool:  # lzma releases the GIL
        alone, before, both = pool.map(_compressed_bytes, (text, training_text, training_text + text))
    bits = 8 / len(text)
    return Baselines(_unigram(train, validation, len(text)), alone * bits, (both - before) * bits)


def _unigram(train: CorpusReader, validation: CorpusReader, text_bytes: int) -> float:
    """Return the cross-entropy of the validation tokens under add-one smoothed training frequencies, in bits per byte.

    Padding of a packed training corpus is not counted.
    """
    size = max(int(train.tokens.max()), int(validation.tokens.max())) + 1
    counts = np.bincount(train.tokens, minlength=size) + 1.0
    if train.sidecar:
        counts[train.sidecar.eod] -= train.sidecar.padding
    nats = -np.log(counts / counts.sum())[validation.tokens].sum()
    return float(nats) / math.log(2) / text_bytes


def _compressed_bytes(text: bytes) -> int:
    """Return the size after `xz -9e`, whose window of 64 MiB holds the whole default corpus."""
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def _text(corpus: CorpusReader, tokenizer: Tokenizer) -> bytes:
    """Decode the text of a corpus (exact, since the tokenizer is lossless)."""
    documents = (corpus.document(index) for index in range(len(corpus.documents) - 1))
    return "".join(tokenizer.decode(document.tolist()) for document in documents).encode()
