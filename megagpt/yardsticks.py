"""Honest yardsticks for bits per byte: what needs no neural network makes of the same validation text."""

from __future__ import annotations

import lzma
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megagpt.data.indexed import CorpusReader
from megagpt.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of the validation text by other means.

    `unigram` predicts each token by its share in the training text, `xz` has seen the validation text alone,
    `xz_after_training` has read the training text first, as the model has.
    """

    unigram: float
    xz: float
    xz_after_training: float


def measure_baselines(train: CorpusReader, validation: CorpusReader, tokenizer: Tokenizer) -> Baselines:
    """Measure all three; compresses the training text twice, which takes seconds per 10 MB."""
    training_text, text = (_text(corpus, tokenizer) for corpus in (train, validation))
    with ThreadPoolExecutor() as pool:  # lzma leaves Python's lock
        alone, before, both = pool.map(_compressed, (text, training_text, training_text + text))
    bits = 8 / len(text)
    return Baselines(_unigram(train, validation, len(text)), alone * bits, (both - before) * bits)


def _unigram(train: CorpusReader, validation: CorpusReader, text_bytes: int) -> float:
    """Cross-entropy of the validation tokens under the training tokens' shares, each counted once more."""
    size = max(int(train.tokens.max()), int(validation.tokens.max())) + 1
    counts = np.bincount(train.tokens, minlength=size) + 1.0
    if train.sidecar:
        counts[train.sidecar.eod] -= train.sidecar.padding
    nats = -np.log(counts / counts.sum())[validation.tokens].sum()
    return float(nats) / math.log(2) / text_bytes


def _compressed(text: bytes) -> int:
    """Bytes after `xz -9e`, whose window of 64 MiB holds the whole default corpus."""
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def _text(corpus: CorpusReader, tokenizer: Tokenizer) -> bytes:
    """The text of a corpus, decoded: the tokenizer is lossless."""
    documents = (corpus.document(number) for number in range(len(corpus.documents) - 1))
    return "".join(tokenizer.decode(document.tolist()) for document in documents).encode()
