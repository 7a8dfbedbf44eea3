"""Tensor parallelism: the matrices of attention, of MLP and of the vocabulary cut over ranks (arXiv 1909.08053).

Own layers, and DeepSpeed's grid as the `mpu` that tells its optimizers who shares what. DeepSpeed's AutoTP would
build process groups of its own over all ranks of the world, which leaves no place for pipeline stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import Tensor, nn

from megagpt.config.deepspeed import Layout
from megagpt.config.recipe import ModelSection, Recipe
from megagpt.model import gpt
from megagpt.model.parallel import ParallelLayers, SequenceShard
from megagpt.model.shapes import LinearShape
from megagpt.model.sharding import ShardSpec, shard_spec


@dataclass(frozen=True)
class Parts:
    """This rank among those that hold the other parts of what is cut."""

    group: Any = None
    index: int = 0
    degree: int = 1


def parts(grid: Any, layout: Layout, rank: int) -> Parts:
    """The place of a rank in a grid; without tensor parallelism there is none."""
    degree = layout.tensor_parallel
    return Parts() if degree == 1 else Parts(grid.get_slice_parallel_group(), rank % degree, degree)


class _Enter(torch.autograd.Function):
    """A tensor that all ranks have goes into parts: as it is; its gradient is the sum over the parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class _Leave(torch.autograd.Function):
    """Parts are summed to a tensor that all ranks have; its gradient goes into each part as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _First(nn.Linear):
    """This rank's share of the outputs of a linear layer."""

    def __init__(self, shape: LinearShape, bias: bool, parts: Parts) -> None:
        super().__init__(shape.in_features, shape.out_features // parts.degree, bias)
        self.group = parts.group

    def forward(self, x: Tensor) -> Tensor:
        """From x [..., in_features], the same on all ranks, to this rank's [..., out_features / degree]."""
        return F.linear(_Enter.apply(x, self.group), self.weight, self.bias)


class _Second(nn.Linear):
    """This rank's share of the inputs of a linear layer; its bias is whole, and added after the sum."""

    def __init__(self, shape: LinearShape, bias: bool, parts: Parts) -> None:
        super().__init__(shape.in_features // parts.degree, shape.out_features, bias)
        self.group = parts.group

    def forward(self, x: Tensor) -> Tensor:
        """From this rank's x [..., in_features / degree] to [..., out_features], the same on all ranks."""
        total: Tensor = _Leave.apply(F.linear(x, self.weight), self.group)
        return total if self.bias is None else total + self.bias


class _VocabularyShare:
    """A `VocabShard` on a process group."""

    def __init__(self, start: int, rows: int, group: Any) -> None:
        self.start = start
        self.rows = rows
        self._group = group

    def sum(self, x: Tensor) -> Tensor:
        """See `VocabShard`."""
        torch.distributed.all_reduce(x, group=self._group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """See `VocabShard`."""
        torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group=self._group)
        return x

    def reduce(self, x: Tensor) -> Tensor:
        """See `VocabShard`."""
        total: Tensor = _Leave.apply(x, self._group)
        return total


def grid(layout: Layout) -> Any:
    """DeepSpeed's process groups for a layout without a pipeline; collective."""
    return PipelineParallelGrid(topology(layout))


def topology(layout: Layout) -> Any:
    """The order of ranks: tensor parts next to each other, then data-parallel copies, then pipeline stages."""
    copies = layout.data_parallel * layout.sequence_parallel  # see sequence.py
    return PipeModelDataParallelTopology(layout.pipeline_stages, layout.tensor_parallel, copies)


def parallel_layers(section: ModelSection, parts: Parts, sequence: SequenceShard | None = None) -> ParallelLayers:
    """What a GPT's layers need to be built as this rank's shards, with sequence parallelism or without."""
    if parts.degree == 1:
        return ParallelLayers(sequence=sequence)
    vocabulary = None
    if shard_spec("layers.0.weight", section, parts.degree) is not None:
        rows = section.vocab_size // parts.degree
        vocabulary = _VocabularyShare(parts.index * rows, rows, parts.group)

    def linear(shape: LinearShape, bias: bool) -> nn.Linear:
        return (_First if shape.split == "column" else _Second)(shape, bias, parts)

    return ParallelLayers(linear, vocabulary, sequence)


@torch.no_grad()
def fill(module: nn.Module, prefix: str, section: ModelSection, seed: int, index: int, degree: int) -> list[str]:
    """Give a module on the meta device memory and its initial weights, or rank `index`'s share of them.

    The names of its parameters in `GPT` begin with `prefix`; they are returned in order.
    """
    module.to_empty(device="cpu")
    names = []
    for name, parameter in module.named_parameters(prefix=prefix):
        cut = shard_spec(name, section, degree)
        shape = list(parameter.shape)
        if cut is None:
            parameter.copy_(gpt.initial_value(name, shape, section, seed))
        else:
            shape[cut.dim] *= degree
            parameter.copy_(cut.shard(gpt.initial_value(name, shape, section, seed), index, degree))
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # for DeepSpeed's gradient norm
        names.append(name)
    return names


def materialise(recipe: Recipe, parts: Parts, parallel: ParallelLayers) -> gpt.GPT:
    """This rank's share of a GPT with its initial weights, on the CPU in fp32."""
    with torch.device("meta"):
        model = gpt.GPT(recipe.model, recipe.document_end, parallel)
    fill(model, "", recipe.model, recipe.seed, parts.index, parts.degree)
    return model


def whole(part: Tensor, cut: ShardSpec | None, group: Any, degree: int) -> Tensor:
    """The whole tensor of the ranks' parts; collective where there is a cut."""
    if cut is None:
        return part
    parts = [torch.empty_like(part) for _ in range(degree)]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return cut.join(parts)
