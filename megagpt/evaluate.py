"""`megagpt evaluate`: how well a trained model predicts text it has not seen."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megagpt.data.evaluation import Evaluation
from megagpt.data.indexed import Reader, corpus_file
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import UserError
from megagpt.model.loss import IGNORED
from megagpt.prepare import PrepareOptions, prepare_command
from megagpt.run import trained
from megagpt.yardsticks import Yardsticks, measure

_TOKENS_AT_ONCE = 8192  # per batch: fills the cores, and fits beside the model


@dataclass(frozen=True)
class Result:
    """Loss in nats per token over a whole text, and what follows from it.

    `bits_per_byte` is None where a corpus has no sidecar that says how many bytes of text it stands for.
    """

    run: str
    data: str
    update: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    yardsticks: Yardsticks | None
    seconds: float

    def __str__(self) -> str:
        bits = f"{self.bits_per_byte:.4f} bits per byte" if self.bits_per_byte is not None else "no byte count"
        lines = [
            f"{self.run} at update {self.update:,}, over all {self.tokens:,} tokens of {self.data} "
            f"({self.seconds:.0f} s):",
            f"loss {self.loss:.4f} nats per token, perplexity {self.perplexity:.2f}, {bits}",
        ]
        if self.yardsticks is not None and self.bits_per_byte is not None:
            rows = [
                ("this model", self.bits_per_byte),
                ("xz -9e that has also read the training text", self.yardsticks.xz_after_training),
                ("xz -9e alone", self.yardsticks.xz),
                ("a unigram model of the training tokens", self.yardsticks.unigram),
            ]
            lines += ["", "bits per byte on the same text, less is better:"]
            lines += [f"  {name:<45}{value:.4f}" for name, value in sorted(rows, key=lambda row: row[1])]
        return "\n".join(lines)


def evaluate(run: Path, data: str | None = None, *, yardsticks: bool = False) -> Result:
    """Evaluate a run's newest checkpoint on a corpus prefix or a text file (default: the recipe's validation)."""
    start = time.perf_counter()
    model = trained.load(run)
    recipe = model.recipe
    tokenizer = Tokenizer(recipe.data.tokenizer) if recipe.data.tokenizer is not None else None
    data = data if data is not None else _held_out(recipe.data.validation)
    with tempfile.TemporaryDirectory() as scratch:
        prefix = data
        if not corpus_file(data, ".idx").exists() and Path(data).exists():
            text = prepare_command([data], _needed(tokenizer).path, Path(scratch) / "text", PrepareOptions(0.0))
            prefix = text.train.prefix
        corpus = Reader(prefix)
        section = recipe.model
        batch = max(1, _TOKENS_AT_ONCE // section.seq_len)
        share = Evaluation(corpus, seq_len=section.seq_len, vocab_size=section.vocab_size, micro_batch=batch)
        loss = _loss(model, share)
        measured = None
        if yardsticks:
            measured = measure(Reader(recipe.data.train[0].path), corpus, _needed(tokenizer))
    return Result(
        run=str(run),
        data=data,
        update=model.checkpoint.state.update,
        tokens=share.tokens,
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=share.bits_per_byte(loss),
        yardsticks=measured,
        seconds=time.perf_counter() - start,
    )


def _held_out(prefixes: Sequence[str]) -> str:
    if not prefixes:
        raise UserError("there is nothing to evaluate on", "the recipe has no data.validation", "give --data")
    if len(prefixes) > 1:
        raise UserError("the recipe validates on several corpora", "\n".join(prefixes), "choose one: --data PREFIX")
    return prefixes[0]


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise UserError("text needs a tokenizer", "the recipe has no data.tokenizer", "evaluate on a prepared corpus")
    return tokenizer


@torch.no_grad()
def _loss(trained_model: trained.Trained, share: Evaluation) -> float:
    model, total, tokens = trained_model.model, 0.0, 0
    device = next(model.parameters()).device
    for input_ids, labels in share.batches():
        total += float(model(input_ids.to(device), labels.to(device), normalizer=1.0).loss)
        tokens += int((labels != IGNORED).sum())
    return total / max(tokens, 1)
