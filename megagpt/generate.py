"""Text from a model: one token at a time, with the keys and values of earlier tokens remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from megagpt.errors import UserError
from megagpt.model.gpt import GPT


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
) -> list[int]:
    """Continue `ids`; return the new tokens, at most `max_new_tokens`, without a final `eod`.

    Temperature 0 takes the likeliest token. `top_k` keeps that many, `top_p` the fewest that hold this
    probability together (arXiv 1904.09751). The same seed gives the same tokens.
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
        return _continue(model, seen, max_new_tokens, pick, eod)
    finally:
        model.train(was_training)


def _continue(
    model: GPT, seen: list[int], max_new_tokens: int, pick: Callable[[Tensor], int], eod: int | None
) -> list[int]:
    capacity = model.section.seq_len
    window = seen if len(seen) <= capacity else seen[-kept(capacity) :]
    device, past, unread = next(model.parameters()).device, model.past(), window
    new: list[int] = []
    read = 0
    while len(new) < max_new_tokens:
        logits = model.read(torch.tensor([unread], device=device), past)
        read += len(unread)
        token = pick(logits[0].float().cpu())
        if token == eod:
            break
        new.append(token)
        unread = [token]
        if read == capacity:
            past, read, unread = model.past(), 0, (seen + new)[-kept(capacity) :]
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
