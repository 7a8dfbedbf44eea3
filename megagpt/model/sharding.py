"""How a parameter is cut over tensor-parallel ranks: by name, on the whole tensor, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.config.recipe import ModelSection


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
    head = section.n_layer + (3 if section.position == "learned" else 2)
    if name in ("layers.0.weight", f"layers.{head}.weight"):
        return None if section.vocab_size % degree else Cut(0, (section.vocab_size,))
    head_dim = section.d_model // section.n_head
    key_width = section.n_kv_head * head_dim
    if ".attention.qkv." in name:
        return Cut(0, (section.d_model, key_width, key_width))
    if ".mlp.up." in name or ".mlp.gate." in name:
        return Cut(0, (section.d_ff,))
    if name.endswith(".attention.output.weight"):
        return Cut(1, (section.d_model,))
    if name.endswith(".mlp.down.weight"):
        return Cut(1, (section.d_ff,))
    return None
