"""Text from a model: one token at a time, with the keys and values of earlier tokens remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import UserError
from megagpt.model import weights
from megagpt.model.gpt import GPT
from megagpt.run import trained

if TYPE_CHECKING:
    from megagpt.recipe import ModelSection


@dataclass(frozen=True)
class Text:
    """A prompt and how a model went on from it."""

    run: str
    update: int
    prompt: str
    continuation: str

    def __str__(self) -> str:
        return printable(self.prompt + self.continuation)


def generate(
    run: Path, prompt: str, tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> Text:
    """Continue `prompt` with a run's newest checkpoint; see `sample` for the rest."""
    model = trained.load(run)
    if model.recipe.data.tokenizer is None:
        raise UserError("text needs a tokenizer", f"{run / 'recipe.yaml'} has no data.tokenizer", "name one there")
    tokenizer = Tokenizer(model.recipe.data.tokenizer)
    new = sample(
        model.model,
        tokenizer.encode(prompt),
        tokens,
        temperature,
        top_k,
        top_p,
        seed,
        tokenizer.eod,
        tokenizer.vocab_size,
    )
    return Text(str(run), model.checkpoint.state.update, prompt, tokenizer.decode(new))


def continue_line(named: Mapping[str, Tensor], section: ModelSection, tokenizer_path: str, prompt: str) -> str:
    """`prompt` continued by 40 tokens, on one line: what a run shows of itself while it learns. Always seed 0."""
    tokenizer = Tokenizer(tokenizer_path)
    model = weights.build_model(named, section)
    new = sample(model, tokenizer.encode(prompt), 40, 0.8, eod=tokenizer.eod, vocab_size=tokenizer.vocab_size)
    text = tokenizer.decode(new)
    return printable(" ".join((prompt + text).split()))


def printable(text: str) -> str:
    """Without control characters: a model that has learned little writes some, and they would upset a terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


@torch.no_grad()
def sample(
    model: GPT,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eod: int | None = None,
    vocab_size: int | None = None,
) -> list[int]:
    """Continue `ids`; return the new tokens, at most `max_new_tokens`, without a final `eod`.

    Temperature 0 takes the likeliest token. `top_k` keeps that many, `top_p` the fewest that hold this
    probability together (arXiv 1904.09751). The same seed gives the same tokens. `vocab_size` keeps the model
    to the tokenizer's ids where its own vocabulary was padded.
    The model sees at most seq_len tokens. When they are full, the oldest quarter is forgotten and the rest is
    read anew: exact for learned and rotary positions alike, and cheaper than to read anew for every token.
    Raises UserError if there is nothing to continue and no `eod` to start from.
    """
    seen = list(ids)
    if not seen:
        if eod is None:
            raise UserError("there is no text to continue", do="give at least one token as a prompt")
        seen = [eod]
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()  # no dropout
    try:
        pick = partial(draw, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        return _continue(model, seen, max_new_tokens, lambda logits: pick(logits[:vocab_size]), eod)
    finally:
        model.train(was_training)


def _continue(
    model: GPT, seen: list[int], max_new_tokens: int, pick: Callable[[Tensor], int], eod: int | None
) -> list[int]:
    capacity = model.section.seq_len
    window = seen if len(seen) <= capacity else seen[-kept(capacity) :]
    device, cache, unread = next(model.parameters()).device, model.new_kv_cache(), window
    new: list[int] = []
    while len(new) < max_new_tokens:
        logits = model.decode(torch.tensor([unread], device=device), cache)
        token = pick(logits[0].float().cpu())
        if token == eod:
            break
        new.append(token)
        unread = [token]
        if cache.length == capacity:
            cache, unread = model.new_kv_cache(), (seen + new)[-kept(capacity) :]
    return new


def kept(capacity: int) -> int:
    """How many of the newest tokens stay when a window of `capacity` tokens is full."""
    return capacity - capacity // 4


def draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator) -> int:
    """Draw one token from logits [vocab_size], fp32 on the CPU; see `sample`."""
    if temperature == 0:
        return int(logits.argmax())
    likeliest, tokens = logits.sort(descending=True, stable=True)
    probabilities = torch.softmax(likeliest[:top_k] / temperature, dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(0) - probabilities  # held by the likelier ones
        probabilities[1:][before[1:] >= top_p] = 0  # the likeliest token always stays
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
