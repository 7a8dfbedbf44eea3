"""Batches for evaluation, which read a corpus once from start to end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from megagpt.corpus.reader import CorpusReader
from megagpt.data.loader import Batch, check_vocabulary
from megagpt.errors import UserError
from megagpt.state import IGNORE_INDEX

_NO_WINDOW = -1  # placeholder that pads the last batch, so that every rank has the same number of windows


class EvaluationBatches:
    """Consecutive windows of `seq_len` tokens of a corpus, distributed evenly over the data-parallel ranks.

    If all windows are included, every token is a label exactly once. The input for the first label is the
    end-of-document token, whose id is recorded in the sidecar. Without a sidecar, this id is unknown, and the first
    token is ignored as a label. Short windows are padded with ignored labels (-100).

    Args:
        corpus: corpus to evaluate on.
        seq_len: tokens per window.
        vocab_size: number of ids in the model's vocabulary.
        micro_batch: windows per batch.
        rank: data-parallel rank.
        data_parallel: number of data-parallel ranks.
        samples: number of windows, spread evenly over the corpus. If None, all windows are included.
        tokenizer: path of the model's tokenizer, which must be the tokenizer of the corpus. If None, it is not checked.

    Attributes:
        prefix: prefix of the corpus.
        tokens: total number of labels on all ranks, without ignored labels.
        is_complete: whether all windows of the corpus are included.

    Raises:
        UserError: the corpus has no tokens, is packed, was made with another tokenizer, or holds ids outside the
            model's vocabulary.
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
            raise UserError("the corpus has no tokens to evaluate on", corpus.prefix, "prepare more text")
        if corpus.packed:
            do = "evaluate on a validation part, which is never packed, or prepare the text without --pack"
            raise UserError("the corpus is packed, so not all of its tokens can be predicted", corpus.prefix, do)
        check_vocabulary(corpus, vocab_size, tokenizer)
        self.prefix = corpus.prefix
        self._corpus = corpus
        self._sidecar = corpus.sidecar
        self._seq_len = seq_len
        all_windows = -(-len(corpus.tokens) // seq_len)
        count = min(all_windows, samples or all_windows)
        windows = np.arange(count, dtype=np.int64) * all_windows // count
        self.is_complete = count == all_windows
        self.tokens = int(np.minimum(seq_len, len(corpus.tokens) - windows * seq_len).sum())
        if self._sidecar is None:
            self.tokens -= 1  # the first token is ignored as a label
        batches = -(-count // (micro_batch * data_parallel))
        padded = np.full(batches * data_parallel * micro_batch, _NO_WINDOW, np.int64)
        padded[:count] = windows
        self._windows = padded.reshape(batches, data_parallel, micro_batch)[:, rank]  # windows of this rank

    @property
    def text_bytes(self) -> float | None:
        """Size in UTF-8 bytes of the text that the labels encode, or None if the corpus has no sidecar.

        If not all windows are included, the size is estimated from their fraction of the tokens.
        """
        if self._sidecar is None:
            return None
        return self._sidecar.text_bytes * self.tokens / self._sidecar.tokens

    def bits_per_byte(self, loss: float) -> float | None:
        """Convert a loss (nats per token) to bits per byte of text, a metric that is independent of the tokenizer.

        Returns None if the corpus has no sidecar.
        """
        text_bytes = self.text_bytes
        return loss * self.tokens / text_bytes / math.log(2) if text_bytes else None

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of this rank in order. All ranks have the same number of batches.

        Raises CorpusChanged if the corpus has changed since it was opened.
        """
        self._corpus.check_unchanged()
        for windows in self._windows.tolist():
            inputs = np.zeros((len(windows), self._seq_len), np.int64)
            labels = np.full_like(inputs, IGNORE_INDEX)
            for row, window in enumerate(windows):
                if window != _NO_WINDOW:
                    self._fill_row(window * self._seq_len, inputs[row], labels[row])
            yield Batch(torch.from_numpy(inputs), torch.from_numpy(labels))

    def __len__(self) -> int:
        """Return the number of batches per rank."""
        return len(self._windows)

    def _fill_row(self, start: int, inputs: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> None:
        """Write the window whose first label is the token at `start`. Each input is the token before its label."""
        count = min(self._seq_len, len(self._corpus.tokens) - start)
        before = min(start, 1)  # number of tokens before the first label, which is 0 at the start of the corpus
        ids = np.frombuffer(self._corpus.read_range(start - before, before + count), self._corpus.dtype)
        labels[:count] = ids[before:]
        inputs[1 - before : count] = ids[:-1]
        if start == 0 and self._sidecar:
            inputs[0] = self._sidecar.eod
        elif start == 0:
            labels[0] = IGNORE_INDEX


def combine_losses(losses: Sequence[tuple[EvaluationBatches, float]]) -> tuple[float, float | None]:
    """Return the mean loss over all tokens of several corpora, and the same loss in bits per byte.

    Args:
        losses: pairs of a corpus and the loss on it, in nats per token.

    Returns:
        The loss in nats per token, and in bits per byte (None if a corpus has no sidecar).
    """
    tokens = sum(part.tokens for part, _ in losses)
    loss = sum(loss * (part.tokens / tokens) for part, loss in losses)
    text_bytes = 0.0
    for part, _ in losses:
        if part.text_bytes is None:
            return loss, None
        text_bytes += part.text_bytes
    return loss, loss * tokens / text_bytes / math.log(2)


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if that overflows a float (for a loss of more than 709 nats)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
