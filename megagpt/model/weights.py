"""The weights of a GPT on disk: by parameter name, fp32, whatever layout trained them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from megagpt.model.gpt import GPT

if TYPE_CHECKING:
    from megagpt.recipe import ModelSection

NAME = "weights.safetensors"


def save(weights: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write named weights into `folder`."""
    save_file(dict(weights), folder / NAME)


def load(folder: Path, section: ModelSection) -> GPT:
    """A GPT with the weights of `folder`, on the CPU, in evaluation mode. Names and shapes must fit."""
    return assemble(load_file(folder / NAME), section)


def assemble(named: Mapping[str, torch.Tensor], section: ModelSection) -> GPT:
    """A GPT that holds these very weights, in evaluation mode. Names and shapes must fit."""
    with torch.device("meta"):  # no memory for initial weights that are thrown away
        model = GPT(section)
    model.load_state_dict(named, assign=True)
    return model.eval()
