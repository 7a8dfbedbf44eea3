"""Generates text from a model one token at a time, with a cache of the keys and values of earlier tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megagpt.checkpoint import loaded_model, weights
from megagpt.errors import UserError, without_controls
from megagpt.model.gpt import GPT
from megagpt.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megagpt.config.recipe import ModelSection

_PREVIEW_TOKENS, _PREVIEW_TEMPERATURE = 40, 0.8


@dataclass(frozen=True)
class GeneratedText:
    """A prompt and its continuation by the checkpoint of a run."""

    run: str
    update: int
    prompt: str
    continuation: str

    def __str__(self) -> str:
        return without_controls(self.prompt + self.continuation)


def generate(
    run: Path, prompt: str, tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> GeneratedText:
    """Continue a prompt with the newest checkpoint of a run.

    Args:
        run: run directory.
        prompt: text to continue.
        tokens: maximum number of new tokens.
        temperature: see `sample`, also for the following arguments.
        top_k: None to sample from all tokens.
        top_p: None to sample from all tokens.
        seed: random seed.

    Raises:
        UserError: there is no valid checkpoint, or the recipe names no tokenizer.
    """
    loaded = loaded_model.load(run)
    if loaded.recipe.data.tokenizer is None:
        where = f"{run / 'recipe.yaml'} has no data.tokenizer"
        raise UserError("text needs a tokenizer", where, "set data.tokenizer there")
    tokenizer = Tokenizer(loaded.recipe.data.tokenizer)
    ids = tokenizer.encode(prompt)
    new = sample(
        loaded.model,
        ids,
        tokens,
        temperature,
        top_k,
        top_p,
        seed,
        tokenizer.eod,
        tokenizer.vocab_size,
    )
    return GeneratedText(str(run), loaded.checkpoint.state.update, prompt, decode_continuation(tokenizer, ids, new))


def continue_line(named: Mapping[str, Tensor], section: ModelSection, tokenizer_path: str, prompt: str) -> str:
    """Continue a prompt by 40 tokens and return all on one line: the sample that a run prints while it trains.

    Args:
        named: the model's weights by parameter name.
        section: the model.
        tokenizer_path: path of its tokenizer.
        prompt: text to continue; the seed is always 0.
    """
    tokenizer = Tokenizer(tokenizer_path)
    model = weights.build_model(named, section)
    ids = tokenizer.encode(prompt)
    new = sample(
        model,
        ids,
        _PREVIEW_TOKENS,
        _PREVIEW_TEMPERATURE,
        eod=tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
    )
    text = prompt + decode_continuation(tokenizer, ids, new)
    return without_controls(re.sub("[ \t\r\n\f\v]+", " ", text).strip(" "))


def decode_continuation(tokenizer: Tokenizer, ids: Sequence[int], new: Sequence[int]) -> str:
    """Return the text of the new tokens after a prompt.

    Decoded without the prompt, they would lose a space at their start with many tokenizers.

    Args:
        tokenizer: the tokenizer.
        ids: the tokens of the prompt.
        new: the tokens after them.
    """
    prompt, text = tokenizer.decode(ids), tokenizer.decode([*ids, *new])
    different = (index for index, (one, other) in enumerate(zip(prompt, text, strict=False)) if one != other)
    return text[next(different, len(prompt)) :]


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
    """Continue a sequence of token ids.

    The context is at most seq_len tokens. When it is full, its oldest quarter is dropped and the rest is prefilled
    into a new cache: exact for learned and rotary positions alike, and cheaper than a prefill for every token.

    Args:
        model: the model. Dropout is disabled while sampling.
        ids: the prompt; if it is empty, `eod` is used.
        max_new_tokens: maximum number of new tokens.
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: sample from this many most likely tokens.
        top_p: sample from the fewest tokens that together have this probability (arXiv 1904.09751).
        seed: the same seed gives the same tokens.
        eod: id that ends the text.
        vocab_size: number of ids to sample from, for models whose vocabulary is larger than the tokenizer's.

    Returns:
        The new tokens, without a final `eod`.

    Raises:
        UserError: the prompt is empty and there is no `eod`.
    """
    prompt = list(ids)
    if not prompt:
        if eod is None:
            raise UserError("there is no text to continue", do="give at least one token as a prompt")
        prompt = [eod]
    generator = torch.Generator().manual_seed(seed)
    pick = partial(draw, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    was_training = model.training
    model.eval()  # no dropout
    try:
        return _decode(model, prompt, max_new_tokens, lambda logits: pick(logits[:vocab_size]), eod)
    finally:
        model.train(was_training)


def _decode(
    model: GPT, prompt: list[int], max_new_tokens: int, pick: Callable[[Tensor], int], eod: int | None
) -> list[int]:
    """Prefill the prompt, then decode one token at a time, each chosen by `pick` from the logits [vocab_size]."""
    capacity = model.section.seq_len
    device = next(model.parameters()).device
    kv_cache = model.new_kv_cache()
    next_ids = prompt if len(prompt) <= capacity else prompt[-retained_tokens(capacity) :]
    new: list[int] = []
    while len(new) < max_new_tokens:
        logits = model.decode(torch.tensor([next_ids], device=device), kv_cache)
        token = pick(logits[0].float().cpu())
        if token == eod:
            break
        new.append(token)
        next_ids = [token]
        if kv_cache.length == capacity:
            kv_cache = model.new_kv_cache()
            next_ids = (prompt + new)[-retained_tokens(capacity) :]
    return new


def retained_tokens(capacity: int) -> int:
    """Return how many of the newest tokens are kept when a context of `capacity` tokens is full."""
    return capacity - capacity // 4


def draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator) -> int:
    """Draw one token from logits [vocab_size], fp32 on the CPU; for the other arguments see `sample`."""
    if temperature == 0:
        return int(logits.argmax())
    sorted_logits, tokens = logits.sort(descending=True, stable=True)
    probabilities = torch.softmax(sorted_logits[:top_k] / temperature, dim=-1)
    if top_p is not None:
        more_likely = probabilities.cumsum(0) - probabilities  # total probability of the tokens before each
        probabilities[1:][more_likely[1:] >= top_p] = 0  # the most likely token always stays
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
