"""Pre-training of GPT models with DeepSpeed, from raw text to an evaluated and exported model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megagpt.inference.language_model import LanguageModel

__version__ = "0.1.0"

__all__ = ["__version__", "load_model"]


def load_model(run: str | Path) -> LanguageModel:
    """Load the newest valid checkpoint of a run directory, to compute logits and generate text with it.

    Torch is imported when this function is called, not when megagpt is imported. DeepSpeed is not needed.

    Args:
        run: the run directory.

    Returns:
        The model, with its tokenizer if the recipe names one.

    Raises:
        megagpt.errors.UserError: The directory holds no valid checkpoint, or its tokenizer is missing.
    """
    from megagpt.inference import language_model

    return language_model.load(Path(run))
