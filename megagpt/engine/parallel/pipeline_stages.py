"""A GPT's list of layers, cut into the stages of DeepSpeed's pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import nn

from megagpt.config.deepspeed import Layout
from megagpt.config.recipe import ModelSection, Recipe
from megagpt.data.loader import Batch
from megagpt.engine.base import Accept
from megagpt.engine.init_model import recompute
from megagpt.engine.parallel import tensor
from megagpt.model import flops, gpt
from megagpt.model.context import ContextBuilder, ForwardContext
from megagpt.model.parallel import SequenceShard


class Stages(PipelineModule):
    """The layers of one stage with their initial weights; the other stages' layers take no memory here.

    `names` gives each parameter its name in `GPT`. The last stage of a tied model has a copy of the matrix, and
    of nothing else: DeepSpeed keeps no more than that in step. The last stage returns the loss of a micro-batch
    taken from `feed`: the sum over its valid tokens divided by `normalizer`. In evaluation `loss_sum` adds up the sums.
    """

    def __init__(self, recipe: Recipe, layout: Layout, rank: int, sequence: SequenceShard | None = None) -> None:
        section = recipe.model
        self._recipe = recipe
        self._layout = layout
        self._rank = rank
        self._sequence = sequence
        self._contexts = ContextBuilder(section, recipe.document_end, sequence)
        costs = flops.layer_costs(section)
        self._cuts = flops.boundaries(costs, layout.pipeline_stages)
        self.names: dict[nn.Parameter, str] = {}
        self.normalizer = 1.0
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self._labels: torch.Tensor | None = None
        self._mean, self._accepted = math.nan, False
        self._expected: Iterator[Batch] = iter(())
        with torch.no_grad():  # it broadcasts the tied matrix, which would else count as an operation on it
            super().__init__([nn.Identity] * len(costs), topology=tensor.topology(layout))  # `_build` has the layers

    def expect(self, batches: Iterable[Batch]) -> None:
        """Register the micro-batches of the coming forward passes. DeepSpeed gives inner stages no token ids."""
        self._expected = iter(batches)

    def forward(self, forward_input: Any) -> Any:
        """Run the layers of this stage on the next registered micro-batch.

        Replaces PipelineModule.forward (deepspeed/runtime/pipe/module.py), which gives layers one argument only.
        """
        device = torch.device(get_accelerator().current_device_name())
        context = self._contexts.for_batch(next(self._expected).input_ids, device)
        hidden = forward_input
        for layer in self.forward_funcs:
            hidden = layer(hidden, context)
        return hidden

    def feed(self, batches: Sequence[Batch], accept: Accept = math.isfinite) -> Iterator[Batch]:
        """Pass the batches on, each one's labels kept for the forward pass that follows.

        In training, `accept` is called once with the loss over all of them, before the last one's backward pass.
        `loss_and_verdict` then reports both to the other stages.
        """
        self._accept, self._total = accept, torch.zeros(())
        self._count = self._coming = len(batches)
        for batch in batches:
            self._labels = batch.labels
            yield batch

    def loss_and_verdict(self) -> tuple[float, bool]:
        """Return the loss of the update and whether it was accepted, as the last stage found; collective."""
        grid = self.mpu()
        found = torch.tensor([self._mean, self._accepted], dtype=torch.float64)
        found = found.to(get_accelerator().current_device_name())
        last = grid.stage_to_global(grid.pipe_parallel_size - 1)
        torch.distributed.broadcast(found, last, group=grid.get_pipe_parallel_group())
        loss, accepted = found.tolist()
        return loss, bool(accepted)

    def get_tied_weights_and_groups(self) -> list[tuple[Any, Any]]:
        """Return what holds the gradient of the tied matrix, and the process group of the stages that share it.

        DeepSpeed 0.19.8 sums `weight.grad` (pipe/engine.py, `_exec_reduce_tied_grads`). In bf16 with an offloaded
        optimizer that is None, since ZeRO accumulates in `weight.grad_accum`: each copy would train by itself.
        """
        pairs = super().get_tied_weights_and_groups()
        accumulated = [getattr(weight, "grad_accum", None) for weight, _ in pairs]
        return [
            (weight if gradient is None else SimpleNamespace(grad=gradient), group)
            for (weight, group), gradient in zip(pairs, accumulated, strict=True)
        ]

    def _specs(self, layers: Sequence[nn.Module], tied: bool) -> list[Any]:
        """What DeepSpeed cuts: modules, and a tied embedding at both ends."""
        first, *middle, head = layers
        if not tied:
            return [first, *middle, _Last(head, self._loss)]
        return [_Tied(first), *middle, _Tied(first, lambda _, hidden, context: self._loss(head, hidden))]

    def _build(self) -> None:
        """Create the layers of this stage: the groups over which tensor-parallel layers communicate exist only now."""
        self._layer_specs = self._specs(self._create_layers(), self._recipe.model.tie_embeddings)
        super()._build()

    def _create_layers(self) -> list[nn.Module]:
        """All layers on the meta device, those of this stage with memory and their initial weights."""
        section, layout = self._recipe.model, self._layout
        parts = tensor.parts(self.mpu(), layout, self._rank)
        with torch.device("meta"):
            layers = gpt.build_layers(section, tensor.parallel_layers(section, parts, self._sequence))
        recompute(layers, layout.recomputed_blocks, layout.activations_on_host)
        local = set(range(self._local_start, self._local_stop))
        if section.tie_embeddings and len(layers) - 1 in local:
            local.add(0)
        for index in sorted(local):
            names = tensor.fill(layers[index], f"layers.{index}", section, self._recipe.seed, parts.index, parts.degree)
            self.names.update(zip(layers[index].parameters(), names, strict=True))
        return layers

    def _partition_layers(self, method: str = "") -> None:
        """Cut by cost: DeepSpeed's own methods count layers, parameters or class names."""
        self.parts = self._cuts
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.parts[stage], self.parts[stage + 1])

    def _loss(self, head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The loss of the micro-batch that was fed last.

        Made inside the module's forward and not by DeepSpeed's `loss_fn`: gradients of parameters that are used
        there are thrown away by BF16_Optimizer, which clears all when backward reaches the module's output.
        """
        assert self._labels is not None  # DeepSpeed loads a micro-batch just before the last stage's forward
        total: torch.Tensor = head(hidden, self._labels.to(hidden.device, non_blocking=True))
        if not self.training:
            self.loss_sum = self.loss_sum.to(total.device) + total.detach()
            return total
        part = total / self.normalizer
        if not self._acceptable(part.detach()):
            part.register_hook(lambda gradient: gradient * math.nan)  # DeepSpeed makes no step on it
        return part

    def _acceptable(self, part: torch.Tensor) -> bool:
        """Whether the loss of the update may be learned from, which is decided with the last micro-batch."""
        self._total, self._coming = self._total.to(part.device) + part, self._coming - 1
        if self._coming:
            return True
        mean = self._total / self._count
        torch.distributed.all_reduce(mean, group=self.mpu().get_data_parallel_group())
        self._mean = float(mean / self.mpu().get_data_parallel_world_size())
        self._accepted = self._accept(self._mean)
        return self._accepted


def local_layers(section: ModelSection, layout: Layout, stage: int) -> list[int]:
    """Return the indices of the layers that a stage holds, in order.

    The last stage of a tied model also holds the embedding (index 0).

    Args:
        section: The model, whose layers are cut by cost.
        layout: The layout, of which only the number of pipeline stages matters.
        stage: The stage, counted from 0.
    """
    cuts = flops.boundaries(flops.layer_costs(section), layout.pipeline_stages)
    local = set(range(cuts[stage], cuts[stage + 1]))
    if section.tie_embeddings and stage == layout.pipeline_stages - 1:
        local.add(0)
    return sorted(local)


class _Last(nn.Module):
    """The head's place in the list: from hidden states to the loss."""

    def __init__(self, head: nn.Module, loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.head = head
        self._loss = loss

    def forward(self, hidden: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """From hidden [batch, seq, d_model] to the loss, a scalar."""
        return self._loss(self.head, hidden)


class _Tied(TiedLayerSpec):
    """A tied layer that exists already."""

    def __init__(self, layer: nn.Module, forward_fn: Any = None) -> None:
        super().__init__("embedding", type(layer), forward_fn=forward_fn)
        self._layer = layer

    def build(self, log: bool = False) -> nn.Module:
        """The layer itself."""
        return self._layer
