"""Tensor parallelism, which shards the matrices of attention, MLP and vocabulary over ranks (arXiv 1909.08053).

This module implements the layers itself. DeepSpeed gets its grid of process groups as `mpu`, so that its optimizers
know which ranks hold the same parameters. DeepSpeed's AutoTP is not used, because it creates its process groups over
all ranks of the job and cannot be combined with pipeline stages.
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
class TensorParallelGroup:
    """Group of the ranks that hold the shards of the same layers, with the index of this rank in the group."""

    group: Any = None
    index: int = 0
    degree: int = 1


def tensor_parallel_group(grid: Any, layout: Layout, rank: int) -> TensorParallelGroup:
    """Return the tensor-parallel group of a rank.

    Args:
        grid: DeepSpeed's grid of process groups. It may be None without tensor parallelism.
        layout: The layout of the job.
        rank: Index of the rank in the job.
    """
    degree = layout.tensor_parallel
    if degree == 1:
        return TensorParallelGroup()
    return TensorParallelGroup(grid.get_slice_parallel_group(), rank % degree, degree)


class CopyToTensorParallelRegion(torch.autograd.Function):
    """Identity function whose backward pass all-reduces the gradient over the tensor-parallel group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        """Return x unchanged."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the sum of the gradient over all ranks of the group."""
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class ReduceFromTensorParallelRegion(torch.autograd.Function):
    """All-reduce over the tensor-parallel group, whose backward pass returns the gradient unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        """Return the sum of x over all ranks of the group."""
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient unchanged, because the gradient of the sum is also the gradient of each rank's x."""
        return gradient, None


class ColumnParallelLinear(nn.Linear):
    """This rank's shard of a linear layer that is split along its outputs."""

    def __init__(self, shape: LinearShape, bias: bool, tensor_parallel: TensorParallelGroup) -> None:
        super().__init__(shape.in_features, shape.out_features // tensor_parallel.degree, bias)
        self.group = tensor_parallel.group

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's outputs [..., out_features / degree] for x [..., in_features], the same on all ranks."""
        return F.linear(CopyToTensorParallelRegion.apply(x, self.group), self.weight, self.bias)


class RowParallelLinear(nn.Linear):
    """This rank's shard of a linear layer that is split along its inputs.

    Each rank holds the whole bias, which is added after summing over the ranks.
    """

    def __init__(self, shape: LinearShape, bias: bool, tensor_parallel: TensorParallelGroup) -> None:
        super().__init__(shape.in_features // tensor_parallel.degree, shape.out_features, bias)
        self.group = tensor_parallel.group

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs [..., out_features], the same on all ranks, for this rank's x [..., in_features / degree]."""
        total: Tensor = ReduceFromTensorParallelRegion.apply(F.linear(x, self.weight), self.group)
        return total if self.bias is None else total + self.bias


class VocabParallelGroup:
    """A `VocabShard` whose collectives run over a process group."""

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
        total: Tensor = ReduceFromTensorParallelRegion.apply(x, self._group)
        return total


def create_grid(layout: Layout) -> Any:
    """Create DeepSpeed's grid of process groups for a layout without a pipeline. Collective."""
    return PipelineParallelGrid(topology(layout))


def topology(layout: Layout) -> Any:
    """Return DeepSpeed's topology, which assigns ranks to tensor-parallel groups, replicas and pipeline stages.

    The ranks of a tensor-parallel group are adjacent, and the replicas of a stage follow each other. Sequence-parallel
    ranks count as data-parallel ranks (engine/parallel/ulysses.py).
    """
    return PipeModelDataParallelTopology(layout.pipeline_stages, layout.tensor_parallel, layout.zero_partitions)


def parallel_layers(
    section: ModelSection, tensor_parallel: TensorParallelGroup, sequence: SequenceShard | None = None
) -> ParallelLayers:
    """Return the `ParallelLayers` with which `GPT` builds this rank's shards of its layers.

    Args:
        section: The model section of the recipe.
        tensor_parallel: The tensor-parallel group of this rank.
        sequence: This rank's shard of the sequences, or None without sequence parallelism.
    """
    if tensor_parallel.degree == 1:
        return ParallelLayers(sequence=sequence)
    vocabulary = None
    if shard_spec("layers.0.weight", section, tensor_parallel.degree) is not None:
        rows = section.vocab_size // tensor_parallel.degree
        vocabulary = VocabParallelGroup(tensor_parallel.index * rows, rows, tensor_parallel.group)

    def linear(shape: LinearShape, bias: bool) -> nn.Linear:
        if shape.split == "column":
            return ColumnParallelLinear(shape, bias, tensor_parallel)
        return RowParallelLinear(shape, bias, tensor_parallel)

    return ParallelLayers(linear, vocabulary, sequence)


@torch.no_grad()
def init_tp_weights(
    module: nn.Module, prefix: str, section: ModelSection, seed: int, index: int, degree: int
) -> list[str]:
    """Allocate a module that is on the meta device, and set its initial weights, or one rank's shard of them.

    Args:
        module: A GPT or one of its layers. It is moved to the CPU.
        prefix: Prefix of the names of the module's parameters in `GPT`.
        section: The model section of the recipe.
        seed: Seed of the initial weights.
        index: Index of the rank in its tensor-parallel group.
        degree: Number of ranks in the group.

    Returns:
        The names in `GPT` of the module's parameters, in the module's order.
    """
    module.to_empty(device="cpu")
    names = []
    for name, parameter in module.named_parameters(prefix=prefix):
        spec = shard_spec(name, section, degree)
        shape = list(parameter.shape)
        if spec is None:
            parameter.copy_(gpt.initial_value(name, shape, section, seed))
        else:
            shape[spec.dim] *= degree
            parameter.copy_(spec.shard(gpt.initial_value(name, shape, section, seed), index, degree))
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # DeepSpeed's gradient norm needs it
        names.append(name)
    return names


def init_tp_model(recipe: Recipe, tensor_parallel: TensorParallelGroup, parallel: ParallelLayers) -> gpt.GPT:
    """Build this rank's shard of a GPT with its initial weights, on the CPU in fp32.

    Args:
        recipe: The recipe with the model and the seed.
        tensor_parallel: The tensor-parallel group of this rank.
        parallel: The result of `parallel_layers`.

    Returns:
        The model.
    """
    with torch.device("meta"):
        model = gpt.GPT(recipe.model, recipe.document_end, parallel)
    init_tp_weights(model, "", recipe.model, recipe.seed, tensor_parallel.index, tensor_parallel.degree)
    return model


def gather_shards(shard: Tensor, spec: ShardSpec | None, tensor_parallel: TensorParallelGroup) -> Tensor:
    """Gather the shards of all ranks, and return the whole tensor. Collective over the group if `spec` is not None.

    Args:
        shard: This rank's shard of the tensor.
        spec: Split of the tensor, or None if every rank holds the whole tensor.
        tensor_parallel: The tensor-parallel group of this rank.
    """
    if spec is None:
        return shard
    shards = [torch.empty_like(shard) for _ in range(tensor_parallel.degree)]
    torch.distributed.all_gather(shards, shard.contiguous(), group=tensor_parallel.group)
    return spec.join(shards)
