"""A trained model read back from its run directory, without DeepSpeed, on one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megagpt import recipe as recipes
from megagpt.errors import UserError
from megagpt.model import weights
from megagpt.model.gpt import GPT
from megagpt.run.checkpoint import Checkpoint, newest_valid


@dataclass(frozen=True)
class Trained:
    """The newest valid checkpoint of a run: its recipe, and its model in evaluation mode, on a GPU if there is one."""

    recipe: recipes.Recipe
    checkpoint: Checkpoint
    model: GPT


def load(run: Path) -> Trained:
    """Read a run directory. Raises UserError where it holds no valid checkpoint."""
    found, damaged = newest_valid(run)
    if found is None:
        raise UserError(
            "there is no trained model here",
            "\n".join(damaged) or f"{run / 'checkpoints'} holds no checkpoint",
            "name the run directory of a run that has saved at least once",
        )
    recipe = recipes.load(run / "recipe.yaml")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Trained(recipe, found, weights.load(found.folder, recipe.model, recipe.document_end).to(device))
