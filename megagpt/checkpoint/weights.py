"""The weights of a GPT out of a checkpoint: by parameter name, fp32, whatever layout trained them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megagpt.checkpoint.tensor_files import WEIGHT, Piece, Pieces
from megagpt.checkpoint.tensor_files import write as write_pieces
from megagpt.files import WriteFile
from megagpt.model.gpt import GPT

if TYPE_CHECKING:
    from megagpt.config.recipe import ModelSection


def save(weights: Iterable[tuple[str, torch.Tensor]], sink: WriteFile) -> None:
    """Write named weights alone, as one rank would."""
    write_pieces((Piece(WEIGHT, name, 0, value.detach().flatten()) for name, value in weights), 0, sink)


def load(folder: Path, section: ModelSection, document_end: int | None = None) -> GPT:
    """A GPT with the weights of a checkpoint, on the CPU, in evaluation mode. Raises UserError where one is missing."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in GPT(section).named_parameters()}
    pieces = Pieces(folder)
    return assemble(
        {name: pieces.whole(WEIGHT, name, shape, section) for name, shape in shapes.items()}, section, document_end
    )


def assemble(named: Mapping[str, torch.Tensor], section: ModelSection, document_end: int | None = None) -> GPT:
    """A GPT that holds these very weights, in evaluation mode. Names and shapes must fit."""
    with torch.device("meta"):  # no memory for initial weights that are thrown away
        model = GPT(section, document_end)
    model.load_state_dict(named, assign=True)
    return model.eval()
