"""A trained language model as a Python object: logits and continuations of text. `megagpt.load_model` returns one."""

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
    """The newest valid checkpoint of a run, in fp32, on a GPU if there is one.

    Attributes:
        recipe: the recipe that the run was trained with.
        update: number of updates that the checkpoint was trained for.
        model: the model, a `torch.nn.Module` in evaluation mode.
        tokenizer: the run's tokenizer, or None if its recipe names none.
    """

    recipe: Recipe
    update: int
    model: GPT
    tokenizer: Tokenizer | None

    @torch.no_grad()
    def logits(self, text: str | Sequence[int]) -> Tensor:
        """Return the logits of the token that follows each token of a text.

        Args:
            text: a text, or token ids: at least one, and at most `recipe.model.seq_len`.

        Returns:
            Logits [tokens, vocab_size], fp32, on the model's device. The last row predicts the token after the text.

        Raises:
            UserError: there are no or too many tokens, or the run has no tokenizer for a text.
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
        """Continue a prompt, as `megagpt generate` does, and return the continuation without the prompt.

        Args:
            prompt: text to continue.
            tokens: maximum number of new tokens.
            temperature: divides the logits; 0 always takes the most likely token.
            top_k: sample from this many most likely tokens; None for no limit.
            top_p: sample from the fewest tokens that together have this probability; None for no limit.
            seed: the same seed gives the same text.

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
    """Load the newest valid checkpoint of a run directory. Raises UserError if there is none."""
    loaded = loaded_model.load(run)
    path = loaded.recipe.data.tokenizer
    tokenizer = None if path is None else Tokenizer(path)
    return LanguageModel(loaded.recipe, loaded.checkpoint.state.update, loaded.model, tokenizer)
