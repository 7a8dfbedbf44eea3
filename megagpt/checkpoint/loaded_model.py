"""Load a trained model from its run directory for inference, without DeepSpeed and in a single process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from megagpt.checkpoint import weights
from megagpt.checkpoint.store import Checkpoint, newest_valid
from megagpt.config import recipe as recipes
from megagpt.errors import UserError
from megagpt.model.gpt import GPT


@dataclass(frozen=True)
class LoadedModel:
    """A trained model in evaluation mode, with the recipe of its run and the checkpoint that it was loaded from.

    The model is on a GPU if one is available.
    """

    recipe: recipes.Recipe
    checkpoint: Checkpoint
    model: GPT


def load(run: Path) -> LoadedModel:
    """Load the model from the newest valid checkpoint of a run. Raises UserError if there is no valid checkpoint."""
    found, damaged = newest_valid(run)
    if found is None:
        raise UserError(
            "there is no trained model here",
            "\n".join(damaged) or f"{run / 'checkpoints'} holds no checkpoint",
            "name the run directory of a run that has saved at least once",
        )
    recipe = recipes.load(run / "recipe.yaml")
    model = weights.load(found.folder, recipe.model, recipe.document_end)
    use_gpu = os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    return LoadedModel(recipe, found, _to_gpu(model) if use_gpu else model)


def _to_gpu(model: GPT) -> GPT:
    """Move the model to the GPU. Raises UserError if it does not fit in the free memory."""
    try:
        return model.to("cuda")
    except torch.OutOfMemoryError:
        free = torch.cuda.mem_get_info()[0]
        size = 4 * sum(parameter.numel() for parameter in model.parameters())
        raise UserError(
            f"the model takes {size / 1e9:.1f} GB in fp32, and the GPU has {free / 1e9:.1f} GB free",
            f"{torch.cuda.get_device_name()}",
            "choose another GPU by CUDA_VISIBLE_DEVICES, or export DS_ACCELERATOR=cpu",
        ) from None
