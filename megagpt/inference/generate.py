"""Generates text from a model one token at a time, with a cache of the keys and values of earlier tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megagpt.checkpoint import loaded_model, weights
from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megagpt.config.recipe import ModelSection

_PREVIEW_TOKENS, _PREVIEW_TEMPERATURE = 40, 0.8


@dataclass(frozen=True)
class GeneratedText:
    """A prompt and its generated continuation.

    Attributes:
        run: run directory.
        update: update at which the checkpoint was saved.
        prompt: text that was continued.
        continuation: generated text.
    """

    run: str
    update: int
    prompt: str
    continuation: str

    def __str__(self) -> str:
        return printable(self.prompt + self.continuation)


def generate(
    run: Path, prompt: str, tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> GeneratedText:
    """Continue a prompt with the newest checkpoint of a run.

    Args:
        run: run directory.
        prompt: text to continue.
        tokens: maximum number of new tokens.
        temperature: divisor of the logits. With 0, the most likely token is always chosen.
        top_k: number of most likely tokens to sample from, or None for all tokens.
        top_p: sample from the smallest set of most likely tokens with at least this total probability. If None, all
            tokens are used.
        seed: random seed.

    Returns:
        The prompt and its continuation.

    Raises:
        UserError: there is no valid checkpoint, or the recipe specifies no tokenizer.
    """
    loaded = loaded_model.load(run)
    if loaded.recipe.data.tokenizer is None:
        where = f"{run / 'recipe.yaml'} has no data.tokenizer"
        raise UserError("text needs a tokenizer", where, "set data.tokenizer there")
    tokenizer = Tokenizer(loaded.recipe.data.tokenizer)
    new = sample(
        loaded.model,
        tokenizer.encode(prompt),
        tokens,
        temperature,
        top_k,
        top_p,
        seed,
        tokenizer.eod,
        tokenizer.vocab_size,
    )
    return GeneratedText(str(run), loaded.checkpoint.state.update, prompt, tokenizer.decode(new))


def continue_line(named: Mapping[str, Tensor], section: ModelSection, tokenizer_path: str, prompt: str) -> str:
    """Continue a prompt by 40 tokens, for the samples that a run prints during training. The random seed is always 0.

    Args:
        named: weights of the model by parameter name.
        section: configuration of the model.
        tokenizer_path: path of the model's tokenizer.
        prompt: text to continue.

    Returns:
        The prompt and its continuation on a single line.
    """
    tokenizer = Tokenizer(tokenizer_path)
    model = weights.build_model(named, section)
    new = sample(
        model,
        tokenizer.encode(prompt),
        _PREVIEW_TOKENS,
        _PREVIEW_TEMPERATURE,
        eod=tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
    )
    text = tokenizer.decode(new)
    return printable(" ".join((prompt + text).split()))


def printable(text: str) -> str:
    """Replace control characters with U+FFFD.

    Models generate them early in training, and a terminal would interpret them.
    """
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


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

    The context is at most seq_len tokens. When it is full, its oldest quarter is dropped and the rest is prefilled into
    a new cache. This is exact for both learned and rotary positions, and cheaper than a prefill for every token.

    Args:
        model: model that predicts the tokens. Dropout is disabled during sampling.
        ids: token ids of the prompt. If the prompt is empty, `eod` is used.
        max_new_tokens: maximum number of new tokens.
        temperature: divisor of the logits. With 0, the most likely token is always chosen.
        top_k: number of most likely tokens to sample from, or None for all tokens.
        top_p: sample from the smallest set of most likely tokens with at least this total probability (nucleus
            sampling, arXiv 1904.09751). If None, all tokens are used.
        seed: random seed. The same seed results in the same tokens.
        eod: id at which sampling ends, or None.
        vocab_size: number of ids to sample from, for models whose vocabulary is larger than the tokenizer's.

    Returns:
        The new tokens, without a final `eod`.

    Raises:
        UserError: the prompt is empty and `eod` is None.
    """
    prompt = list(ids)
    if not prompt:
        if eod is None:
            raise UserError("there is no text to continue", do="give at least one token as a prompt")
        prompt = [eod]
    generator = torch.Generator().manual_seed(seed)
    pick = partial(draw, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    was_training = model.training
    model.eval()  # disables dropout
    try:
        return _decode(model, prompt, max_new_tokens, lambda logits: pick(logits[:vocab_size]), eod)
    finally:
        model.train(was_training)


def _decode(
    model: GPT, prompt: list[int], max_new_tokens: int, pick: Callable[[Tensor], int], eod: int | None
) -> list[int]:
    """Prefill the prompt, and then decode one token at a time.

    `pick` chooses each token from its logits [vocab_size]. Returns the new tokens.
    """
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
    """Return the number of newest tokens that are kept when a context of `capacity` tokens is full."""
    return capacity - capacity // 4


def draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator) -> int:
    """Draw a token from logits [vocab_size], which must be fp32 and on the CPU.

    The other arguments are described under `sample`.
    """
    if temperature == 0:
        return int(logits.argmax())
    sorted_logits, tokens = logits.sort(descending=True, stable=True)
    probabilities = torch.softmax(sorted_logits[:top_k] / temperature, dim=-1)
    if top_p is not None:
        more_likely = probabilities.cumsum(0) - probabilities  # total probability of all more likely tokens
        probabilities[1:][more_likely[1:] >= top_p] = 0  # the most likely token is always kept
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
