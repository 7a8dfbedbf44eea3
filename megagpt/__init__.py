"""megagpt: raw text to a pre-trained, evaluated, exported GPT, on DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megagpt.inference.language_model import LanguageModel

__version__ = "0.1.0"

__all__ = ["__version__", "load_model"]


def load_model(run: str | Path) -> LanguageModel:
    """Load the newest valid checkpoint of a run directory, to compute logits and generate text with it.

    Imports torch when it is called, not when megagpt is imported. DeepSpeed is not needed.

    Raises:
        megagpt.errors.UserError: the directory holds no valid checkpoint, or its tokenizer is missing.
    """
    from megagpt.inference import language_model

    return language_model.load(Path(run))
