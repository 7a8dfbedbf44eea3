"""A trained language model, as returned by `megagpt.load_model`. It computes logits and continues text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megagpt.checkpoint import loaded_model
from megagpt.errors import UserError
from megagpt.inference.generate import sample
from megagpt.model.gpt import GPT
from megagpt.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megagpt.config.recipe import Recipe


@dataclass(frozen=True)
class LanguageModel:
    """Model of the newest valid checkpoint of a run, in fp32, on a GPU if there is one.

    Attributes:
        recipe: recipe of the run.
        update: number of updates after which the checkpoint was saved.
        model: the model as a `torch.nn.Module`, in evaluation mode.
        tokenizer: tokenizer of the run, or None if the recipe specifies none.
    """

    recipe: Recipe
    update: int
    model: GPT
    tokenizer: Tokenizer | None

    @torch.no_grad()
    def logits(self, text: str | Sequence[int]) -> Tensor:
        """Return the logits that predict the next token after each token of a text.

        Args:
            text: text or token ids. The number of tokens must be from 1 to `recipe.model.seq_len`.

        Returns:
            Logits [tokens, vocab_size] in fp32, on the model's device. The last row predicts the token after the text.

        Raises:
            UserError: there are no tokens or too many, or `text` is a string and the run has no tokenizer.
        """
        ids = self._ids(text)
        capacity = self.recipe.model.seq_len
        if not 1 <= len(ids) <= capacity:
            raise UserError(
                f"the model reads 1 to {capacity} tokens, not {len(ids)}", do="give a shorter text, or split it"
            )
        input_ids = torch.tensor([ids], device=next(self.model.parameters()).device)
        logits: Tensor = self.model(input_ids).logits
        return logits[0].float()

    def generate(
        self,
        prompt: str,
        tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 1234,
    ) -> str:
        """Continue a prompt, like `megagpt generate`.

        Args:
            prompt: text to continue.
            tokens: maximum number of new tokens.
            temperature: divisor of the logits. With 0, the most likely token is always chosen.
            top_k: number of most likely tokens to sample from, or None for all tokens.
            top_p: sample from the smallest set of most likely tokens with at least this total probability. If None, all
                tokens are used.
            seed: random seed. The same seed results in the same text.

        Returns:
            The continuation, without the prompt.

        Raises:
            UserError: the run has no tokenizer.
        """
        tokenizer = self._require_tokenizer()
        ids = tokenizer.encode(prompt)
        new = sample(self.model, ids, tokens, temperature, top_k, top_p, seed, tokenizer.eod, tokenizer.vocab_size)
        return tokenizer.decode(new)

    def _ids(self, text: str | Sequence[int]) -> list[int]:
        return self._require_tokenizer().encode(text) if isinstance(text, str) else list(text)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            where = "the recipe of the run has no data.tokenizer"
            raise UserError("text needs a tokenizer", where, "set data.tokenizer there, or pass token ids")
        return self.tokenizer


def load(run: Path) -> LanguageModel:
    """Load the newest valid checkpoint in a run directory. Raises UserError if there is none."""
    loaded = loaded_model.load(run)
    path = loaded.recipe.data.tokenizer
    tokenizer = None if path is None else Tokenizer(path)
    return LanguageModel(loaded.recipe, loaded.checkpoint.state.update, loaded.model, tokenizer)
