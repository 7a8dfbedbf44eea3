"""How a parameter is cut over tensor-parallel ranks: by name, on the whole tensor, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megagpt.model.shapes import head_index, linear_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.recipe import ModelSection


@dataclass(frozen=True)
class Cut:
    """The parameter holds `blocks` one after another along `dim`; each rank has its even share of every block."""

    dim: int
    blocks: tuple[int, ...]

    def part(self, whole: Tensor, index: int, degree: int) -> Tensor:
        """The share of rank `index` of `degree`, as a tensor of its own."""
        import torch

        blocks = torch.split(whole, list(self.blocks), self.dim)
        return torch.cat([block.chunk(degree, self.dim)[index] for block in blocks], self.dim)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole of the shares of all ranks, in their order."""
        import torch

        sizes = [size // len(parts) for size in self.blocks]
        split = [torch.split(part, sizes, self.dim) for part in parts]
        return torch.cat([share for block in zip(*split, strict=True) for share in block], self.dim)


def cut_of(name: str, section: ModelSection, degree: int) -> Cut | None:
    """How the parameter of this name in `GPT` is cut over `degree` ranks; None where every rank has it whole.

    As Megatron does (arXiv 1909.08053): the first matrix of attention and of MLP by its outputs, so that each
    rank has whole heads, and the second by its inputs; their products are summed over the ranks. The vocabulary's
    rows are cut too, if their number divides by the degree.
    """
    if degree == 1:
        return None
    if name in ("layers.0.weight", f"layers.{head_index(section)}.weight"):
        return None if section.vocab_size % degree else Cut(0, (section.vocab_size,))
    layer, kind = name.rpartition(".")[::2]
    linear = linear_shapes(section).get(layer.split(".", 2)[-1])
    if linear is None:
        return None
    if linear.split == "column":
        return Cut(0, linear.sections)
    return Cut(1, linear.sections) if kind == "weight" else None
