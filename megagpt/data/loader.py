"""Batches of one data-parallel rank, gathered straight from the memory map."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megagpt.data.indexed import Reader, corpus_file
from megagpt.data.order import Located, Order, rank_positions
from megagpt.errors import UserError

IGNORED = -100  # a label that takes no part in the loss
_PROBES, _PROBE_TOKENS = 64, 1024  # places looked at when a corpus is opened, and tokens at each


class Batch(NamedTuple):
    """One micro-batch: `input_ids` and `labels` (shifted already), int64 `[micro, seq]`."""

    input_ids: torch.Tensor
    labels: torch.Tensor


class Loader:
    """Gives the micro-batches of one data-parallel rank for the update at any data position.

    `sources` are (prefix, weight) pairs. `order` says which sample comes when; `notes` says which corpora are
    unverified; `fingerprint` (plain JSON values) names the data and its order, for comparison on resume.
    Raises UserError where a corpus is missing, damaged, too short, or holds ids that the model does not know.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str | os.PathLike[str], float]],
        *,
        seq_len: int,
        seed: int,
        vocab_size: int,
        micro_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        data_parallel: int = 1,
    ) -> None:
        self._readers = [Reader(prefix) for prefix, _ in sources]
        probes = [check_ids(reader, vocab_size) for reader in self._readers]
        weights = [weight for _, weight in sources]
        for reader in self._readers:
            if len(reader.tokens) <= seq_len:
                what = f"the corpus has {len(reader.tokens):,} tokens, fewer than one sample ({seq_len + 1:,})"
                raise UserError(what, reader.prefix, "prepare more text, or lower model.seq_len")
            reader.advise_random()
        self.order = Order([len(reader.tokens) for reader in self._readers], weights, seq_len, seed)
        self.notes = tuple(note for reader in self._readers if (note := unverified(reader)))
        self.fingerprint: dict[str, Any] = {
            "seq_len": seq_len,
            "seed": seed,
            "sources": [_facts(*source) for source in zip(self._readers, weights, probes, strict=True)],
        }
        self._share = (rank, data_parallel, micro_batch, accumulation)
        self._shape = (accumulation, micro_batch)
        self._global_batch = data_parallel * micro_batch * accumulation
        self._windows = [_windows(reader.tokens, seq_len + 1) for reader in self._readers]
        # Positions are located some 4,096 at a time: hardly dearer than a handful.
        self._block_updates = max(1, 4096 // (micro_batch * accumulation))
        self._fill_block(0)

    def batches(self, position: int) -> list[Batch]:
        """The micro-batches `[accumulation]` of the update that begins at this data position.

        The samples of the update after it are asked for from the disk on the way.
        """
        samples = torch.from_numpy(self._gather(self._locate(position))).view(*self._shape, -1)
        self._advise(self._locate(position + self._global_batch))
        return [Batch(micro[:, :-1], micro[:, 1:]) for micro in samples]

    def _locate(self, position: int) -> Located:
        """This rank's samples of the update at `position`, out of a block of updates that is computed at once."""
        update, rest = divmod(position - self._block_position, self._global_batch)
        if rest or not 0 <= update < self._block_updates:
            self._fill_block(position)
            update = 0
        count = len(self._block.start) // self._block_updates
        part = slice(update * count, (update + 1) * count)
        return Located(*(column[part] for column in self._block))

    def _fill_block(self, position: int) -> None:
        rank, data_parallel, micro_batch, accumulation = self._share
        steps = accumulation * self._block_updates
        positions = rank_positions(position, rank, data_parallel, micro_batch, steps)
        self._block_position, self._block = position, self.order.locate(positions.reshape(-1))

    def _gather(self, located: Located) -> npt.NDArray[np.int64]:
        """Samples `[count, seq + 1]`: one fancy index per source, copied once."""
        if len(self._windows) == 1:
            return self._windows[0][located.start].astype(np.int64)
        samples = np.empty((len(located.start), self.order.seq_len + 1), np.int64)
        for source in np.unique(located.source):
            rows = np.flatnonzero(located.source == source)
            samples[rows] = self._windows[source][located.start[rows]]
        return samples

    def _advise(self, located: Located) -> None:
        """Ask for coming samples, so that the disk works while the model does."""
        for source, reader in enumerate(self._readers):
            starts = located.start if len(self._readers) == 1 else located.start[located.source == source]
            reader.advise_coming(starts, self.order.seq_len + 1)


def check_ids(reader: Reader, vocab_size: int) -> int:
    """Compare the ids at 64 places spread over the corpus with the model's vocabulary; crc32 of what was seen.

    Raises UserError if an id does not fit, or if the corpus says itself that its vocabulary is larger.
    """
    do = "set model.vocab_size to the tokenizer's, or prepare the corpus with the model's tokenizer"
    if reader.sidecar and reader.sidecar.vocab_size > vocab_size:
        what = f"the corpus has a vocabulary of {reader.sidecar.vocab_size}, the model only one of {vocab_size}"
        raise UserError(what, reader.prefix, do)
    probe = _probe(reader.tokens)
    odd = probe[(probe < 0) | (probe >= vocab_size)]
    if odd.size:
        what = f"the corpus holds token ids such as {odd[0]}, the model knows 0 to {vocab_size - 1}"
        raise UserError(what, reader.prefix, do)
    return zlib.crc32(probe.tobytes())


def unverified(reader: Reader) -> str:
    """A sentence for people if the corpus comes without a sidecar, else nothing."""
    missing = corpus_file(reader.prefix, ".json")
    return "" if reader.sidecar else f"{reader.prefix}: unverified (no {missing.name} says how it was made)"


def _windows(tokens: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """Every stretch of `length` tokens as a row `[tokens - length + 1, length]`: a view, nothing is copied."""
    return np.lib.stride_tricks.sliding_window_view(tokens, length)


def _probe(tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Tokens at places spread evenly over the corpus, its first and its last ones among them; all, if it is small."""
    if len(tokens) <= _PROBES * _PROBE_TOKENS:
        return np.asarray(tokens)
    starts = np.linspace(0, len(tokens) - _PROBE_TOKENS, _PROBES).astype(np.int64)
    return _windows(tokens, _PROBE_TOKENS)[starts]


def _facts(reader: Reader, weight: float, probe: int) -> dict[str, Any]:
    """What tells one corpus from another, wherever it lies."""
    crc32 = reader.sidecar.bin_crc32 if reader.sidecar else None
    return {"tokens": len(reader.tokens), "crc32": crc32, "probe_crc32": probe, "weight": weight}
