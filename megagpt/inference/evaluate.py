"""The command `megagpt evaluate`, which measures loss, perplexity and bits per byte of a model on unseen text."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megagpt.checkpoint import loaded_model
from megagpt.corpus.reader import CorpusReader, corpus_file
from megagpt.data.evaluation_batches import EvaluationBatches, perplexity
from megagpt.errors import UserError
from megagpt.inference.baselines import Baselines, measure_baselines
from megagpt.prepare.command import PrepareOptions, prepare_command
from megagpt.state import IGNORE_INDEX
from megagpt.tokenizer.tokenizer import Tokenizer

# Number of tokens per batch, which is enough to use all cores. The memory of a batch is small compared with the model.
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class EvaluationResult:
    """Loss of a model on a whole text, and metrics derived from the loss.

    Attributes:
        run: run directory.
        data: corpus prefix or text file on which the model was evaluated.
        update: update at which the checkpoint was saved.
        tokens: number of predicted tokens.
        loss: loss in nats per token.
        perplexity: exp(loss).
        bits_per_byte: loss in bits per byte, or None if the corpus has no sidecar, which records the size of its text.
        yardsticks: baselines on the same text, or None if they were not requested.
        seconds: duration of the evaluation.
    """

    run: str
    data: str
    update: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    yardsticks: Baselines | None
    seconds: float

    def __str__(self) -> str:
        bits = "no bits per byte (no sidecar)"
        if self.bits_per_byte is not None:
            bits = f"{self.bits_per_byte:.4f} bits per byte"
        lines = [
            f"{self.run} at update {self.update:,}, on all {self.tokens:,} tokens of {self.data} "
            f"({self.seconds:.0f} s):",
            f"loss {self.loss:.4f} nats per token, perplexity {self.perplexity:.2f}, {bits}",
        ]
        if self.yardsticks is not None and self.bits_per_byte is not None:
            rows = [
                ("this model", self.bits_per_byte),
                ("xz -9e, after reading the training text", self.yardsticks.xz_after_training),
                ("xz -9e alone", self.yardsticks.xz),
                ("unigram model of the training tokens", self.yardsticks.unigram),
            ]
            lines += ["", "bits per byte on the same text (lower is better):"]
            lines += [f"  {name:<45}{value:.4f}" for name, value in sorted(rows, key=lambda row: row[1])]
        return "\n".join(lines)


def evaluate(run: Path, data: str | None = None, *, yardsticks: bool = False) -> EvaluationResult:
    """Evaluate the newest checkpoint of a run.

    Args:
        run: run directory.
        data: prefix of a corpus, or path of a text file. If None, the recipe's validation corpus is used.
        yardsticks: whether to measure the baselines as well.

    Returns:
        The loss and the metrics derived from it.

    Raises:
        UserError: there is no valid checkpoint or no text to evaluate on, or a text file or the baselines need a
            tokenizer that the recipe does not specify.
    """
    start = time.perf_counter()
    loaded = loaded_model.load(run)
    recipe = loaded.recipe
    tokenizer = None
    if recipe.data.tokenizer is not None:
        tokenizer = Tokenizer(recipe.data.tokenizer)
    if data is None:
        data = _validation_prefix(recipe.data.validation)
    with tempfile.TemporaryDirectory() as scratch:
        prefix = data
        if not corpus_file(data, ".idx").exists() and Path(data).exists():
            summary = prepare_command([data], _require(tokenizer).path, Path(scratch) / "text", PrepareOptions(0.0))
            prefix = summary.train.prefix
        corpus = CorpusReader(prefix)
        section = recipe.model
        micro_batch = max(1, _BATCH_TOKENS // section.seq_len)
        batches = EvaluationBatches(
            corpus, seq_len=section.seq_len, vocab_size=section.vocab_size, micro_batch=micro_batch
        )
        loss = _loss(loaded, batches)
        baselines = None
        if yardsticks:
            baselines = measure_baselines(CorpusReader(recipe.data.train[0].path), corpus, _require(tokenizer))
    return EvaluationResult(
        run=str(run),
        data=data,
        update=loaded.checkpoint.state.update,
        tokens=batches.tokens,
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=batches.bits_per_byte(loss),
        yardsticks=baselines,
        seconds=time.perf_counter() - start,
    )


def _validation_prefix(prefixes: Sequence[str]) -> str:
    """Return the recipe's only validation corpus. Raises UserError if the recipe has none or several."""
    if not prefixes:
        raise UserError("there is nothing to evaluate on", "the recipe has no data.validation", "give --data")
    if len(prefixes) > 1:
        do = "choose one with --data PREFIX"
        raise UserError("the recipe has several validation corpora", "\n".join(prefixes), do)
    return prefixes[0]


def _require(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        do = "set data.tokenizer there, or evaluate on a prepared corpus"
        raise UserError("text needs a tokenizer", "the recipe has no data.tokenizer", do)
    return tokenizer


@torch.no_grad()
def _loss(loaded: loaded_model.LoadedModel, batches: EvaluationBatches) -> float:
    """Return the mean loss over all labels, in nats per token."""
    model = loaded.model
    device = next(model.parameters()).device
    total = 0.0
    tokens = 0
    for input_ids, labels in batches.batches():
        total += float(model(input_ids.to(device), labels.to(device), normalizer=1.0).loss)
        tokens += int((labels != IGNORE_INDEX).sum())
    return total / max(tokens, 1)
