"""Save and load the weights of a GPT by parameter name in fp32, independently of the layout of the training run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megagpt.checkpoint.tensor_files import WEIGHT, TensorFiles, TensorSlice, write_slices
from megagpt.files import WriteFile
from megagpt.model.gpt import GPT
from megagpt.model.shapes import layer_shapes

if TYPE_CHECKING:
    from megagpt.config.recipe import ModelSection


def save(weights: Iterable[tuple[str, torch.Tensor]], sink: WriteFile) -> None:
    """Write weights without optimizer state, in the format of a checkpoint of a single rank.

    Args:
        weights: pairs of the name and the tensor of each parameter
        sink: function that writes a file

    """
    write_slices((TensorSlice(WEIGHT, name, 0, value.detach().flatten()) for name, value in weights), 0, sink)


def load(folder: Path, section: ModelSection, document_end: int | None = None) -> GPT:
    """Load the weights of a checkpoint.

    Args:
        folder: folder of the checkpoint
        section: model section of the recipe
        document_end: id of the token that ends a document, as in `GPT`

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        UserError: if a weight is missing

    """
    files = TensorFiles(folder)
    shapes = {name: shape for layer in layer_shapes(section) for name, shape in layer.items()}
    weights = {name: files.read_whole(WEIGHT, name, shape, section) for name, shape in shapes.items()}
    return build_model(weights, section, document_end)


def build_model(weights: Mapping[str, torch.Tensor], section: ModelSection, document_end: int | None = None) -> GPT:
    """Build a GPT whose parameters are the given tensors, without copying them.

    Args:
        weights: tensor of each parameter by the parameter's name
        section: model section of the recipe
        document_end: id of the token that ends a document, as in `GPT`

    Returns:
        The model, in evaluation mode.

    """
    with torch.device("meta"):  # allocates no memory for initial weights
        model = GPT(section, document_end)
    model.load_state_dict(weights, assign=True)
    return model.eval()
