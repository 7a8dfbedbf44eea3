"""A trained model read back from its run directory, without DeepSpeed, on one process."""

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
    model = weights.load(found.folder, recipe.model, recipe.document_end)
    return Trained(
        recipe, found, _placed(model, os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available())
    )


def _placed(model: GPT, on_gpu: bool) -> GPT:
    """The model where it is to compute. Raises UserError where a GPU has no room for it beside what it holds."""
    if not on_gpu:
        return model
    try:
        return model.to("cuda")
    except torch.OutOfMemoryError:
        free, size = torch.cuda.mem_get_info()[0], sum(one.numel() for one in model.parameters()) * 4
        raise UserError(
            f"the model takes {size / 1e9:.1f} GB in fp32, and the GPU has {free / 1e9:.1f} GB free",
            f"{torch.cuda.get_device_name()}",
            "choose another GPU by CUDA_VISIBLE_DEVICES, or export DS_ACCELERATOR=cpu",
        ) from None
