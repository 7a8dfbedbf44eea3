"""A corpus read once from end to end, in order, for the loss over all of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from megagpt.data.indexed import CorpusReader
from megagpt.data.loader import Batch, check_vocabulary
from megagpt.errors import UserError
from megagpt.state import IGNORE_INDEX


class EvaluationBatches:
    """Non-overlapping windows of `seq_len` over a corpus, shared evenly by the data-parallel ranks.

    Every token is a label exactly once: the first one follows the end-of-document symbol (where none is known it
    is left out), and the last window, where it is ragged, is filled with labels of -100. With `samples`, that many
    windows spread evenly over the corpus stand for all. `tokens` counts the labels of all ranks together.
    Raises UserError for a corpus without tokens, a packed one, or ids that the model does not know.
    """

    def __init__(
        self,
        corpus: CorpusReader,
        *,
        seq_len: int,
        vocab_size: int,
        micro_batch: int,
        rank: int = 0,
        data_parallel: int = 1,
        samples: int | None = None,
        tokenizer: str | None = None,
    ) -> None:
        if len(corpus.tokens) == 0:
            raise UserError("the corpus holds no tokens to validate on", corpus.prefix, "prepare more text")
        if corpus.packed:
            do = "validate on a validation part, which is never packed, or prepare the text without --pack"
            raise UserError("the corpus is packed, and not all of its tokens can be predicted", corpus.prefix, do)
        check_vocabulary(corpus, vocab_size, tokenizer)
        self.prefix, self._corpus = corpus.prefix, corpus
        self._facts = corpus.sidecar
        self._seq_len, self._micro_batch = seq_len, micro_batch
        windows = -(-len(corpus.tokens) // seq_len)
        count = min(windows, samples or windows)
        numbers = np.arange(count, dtype=np.int64) * windows // count
        self.whole = count == windows
        self.tokens = int(np.minimum(seq_len, len(corpus.tokens) - numbers * seq_len).sum())
        self.tokens -= self._facts is None  # the first token, without anything before it
        batches = -(-count // (micro_batch * data_parallel))
        padded = np.full(batches * data_parallel * micro_batch, -1, np.int64)  # -1: an empty window
        padded[:count] = numbers
        self._mine = padded.reshape(batches, data_parallel, micro_batch)[:, rank]

    @property
    def text_bytes(self) -> float | None:
        """UTF-8 bytes of text that the labels stand for, for bits per byte; None where no sidecar says.

        Exact when `whole`; for a part of the corpus its share of all bytes by tokens.
        """
        if self._facts is None:
            return None
        return self._facts.text_bytes * self.tokens / self._facts.tokens

    def bits_per_byte(self, loss: float) -> float | None:
        """A loss in nats per label as bits per byte of text, which no tokenizer changes; None without a sidecar."""
        size = self.text_bytes
        return loss * self.tokens / size / math.log(2) if size else None

    def batches(self) -> Iterator[Batch]:
        """This rank's batches in order: as many on every rank, so that all can meet after each one.

        Raises CorpusChanged where the corpus is no longer what was opened.
        """
        self._corpus.check_unchanged()
        for numbers in self._mine.tolist():
            inputs = np.zeros((len(numbers), self._seq_len), np.int64)
            labels = np.full_like(inputs, IGNORE_INDEX)
            for row, number in enumerate(numbers):
                if number >= 0:
                    self._fill(number * self._seq_len, inputs[row], labels[row])
            yield Batch(torch.from_numpy(inputs), torch.from_numpy(labels))

    def __len__(self) -> int:
        return len(self._mine)

    def _fill(self, start: int, inputs: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> None:
        """Write the window whose first label is token `start`, and before each label the token that precedes it."""
        count, before = min(self._seq_len, len(self._corpus.tokens) - start), min(start, 1)
        ids = np.frombuffer(self._corpus.read_range(start - before, before + count), self._corpus.dtype)
        labels[:count] = ids[before:]
        inputs[1 - before : count] = ids[:-1]
        if start == 0 and self._facts:
            inputs[0] = self._facts.eod
        elif start == 0:
            labels[0] = IGNORE_INDEX


def combine_losses(losses: Sequence[tuple[EvaluationBatches, float]]) -> tuple[float, float | None]:
    """Loss and bits per byte over all corpora together, each with its own loss; no bits where a sidecar is missing."""
    tokens = sum(part.tokens for part, _ in losses)
    loss = sum(loss * (part.tokens / tokens) for part, loss in losses)
    sizes = [part.text_bytes for part, _ in losses]
    known = sum(size for size in sizes if size is not None)
    return loss, None if None in sizes else loss * tokens / known / math.log(2)
