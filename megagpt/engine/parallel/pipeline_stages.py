"""Pipeline stages: partition the layers of a GPT over the stages of DeepSpeed's pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import nn

from megagpt.config.deepspeed import Layout
from megagpt.config.recipe import ModelSection, Recipe
from megagpt.data.loader import Batch
from megagpt.engine import deepspeed_patches
from megagpt.engine.base import Accept
from megagpt.engine.init_model import recompute
from megagpt.engine.parallel import tensor
from megagpt.model import flops, gpt
from megagpt.model.context import ContextBuilder, ForwardContext
from megagpt.model.parallel import SequenceShard


class PipelineStage(PipelineModule):
    """The layers of one pipeline stage. The layers of other stages use no memory on this rank.

    The last stage of a tied model has a copy of the embedding matrix, and DeepSpeed keeps the two copies equal. The
    last stage also computes the loss of each micro-batch that `feed` yields. In training, this is the sum over the
    valid tokens, divided by `normalizer`.

    Attributes:
        names: The name in `GPT` of each parameter of this stage.
        normalizer: Divisor of the loss in training.
        loss_sum: Sum of the losses of all micro-batches in evaluation.
    """

    def __init__(self, recipe: Recipe, layout: Layout, rank: int, sequence: SequenceShard | None = None) -> None:
        section = recipe.model
        self._recipe = recipe
        self._layout = layout
        self._rank = rank
        self._sequence = sequence
        self._contexts = ContextBuilder(section, recipe.document_end, sequence)
        costs = flops.layer_costs(section)
        self._boundaries = flops.boundaries(costs, layout.pipeline_stages)
        self.names: dict[nn.Parameter, str] = {}
        self.normalizer = 1.0
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self._labels: torch.Tensor | None = None
        self._mean_loss = math.nan
        self._accepted = False
        self._registered: Iterator[Batch] = iter(())
        # The constructor broadcasts the tied matrix, which autograd must not record. `_build` replaces the identities.
        with torch.no_grad():
            super().__init__([nn.Identity] * len(costs), topology=tensor.topology(layout))

    def register_batches(self, batches: Iterable[Batch]) -> None:
        """Register the micro-batches of the coming forward passes.

        All stages need the token ids, but DeepSpeed passes them only to the first stage.
        """
        self._registered = iter(batches)

    def forward(self, forward_input: Any) -> Any:
        """Run the layers of this stage on the next registered micro-batch.

        Replaces PipelineModule.forward (deepspeed/runtime/pipe/module.py), which passes only one argument to layers.
        """
        device = torch.device(get_accelerator().current_device_name())
        context = self._contexts.for_batch(next(self._registered).input_ids, device)
        hidden = forward_input
        for layer in self.forward_funcs:
            hidden = layer(hidden, context)
        return hidden

    def feed(self, batches: Sequence[Batch], accept: Accept = math.isfinite) -> Iterator[Batch]:
        """Yield micro-batches to DeepSpeed, and store the labels of each one for the forward pass that follows.

        In training, `accept` is called once with the mean loss of all batches, before the backward pass of the last
        one. After the update, `broadcast_loss` returns the loss and the result of `accept` on every stage.

        Args:
            batches: The micro-batches of an update, or some micro-batches of an evaluation.
            accept: Function that returns whether to apply the update, given the loss.
        """
        self._accept = accept
        self._total_loss = torch.zeros(())
        self._count = len(batches)
        self._remaining = len(batches)
        for batch in batches:
            self._labels = batch.labels
            yield batch

    def broadcast_loss(self) -> tuple[float, bool]:
        """Send the loss of the update from the last stage to all stages. Collective.

        Returns:
            The loss, and whether it was accepted.
        """
        grid = self.mpu()
        values = torch.tensor([self._mean_loss, self._accepted], dtype=torch.float64)
        values = values.to(get_accelerator().current_device_name())
        last = grid.stage_to_global(grid.pipe_parallel_size - 1)
        torch.distributed.broadcast(values, last, group=grid.get_pipe_parallel_group())
        loss, accepted = values.tolist()
        return loss, bool(accepted)

    def get_tied_weights_and_groups(self) -> list[tuple[Any, Any]]:
        """Return the tied matrix, or an object with its gradient, and the process group of the stages that share it."""
        return deepspeed_patches.with_accumulated_gradients(super().get_tied_weights_and_groups())

    def _specs(self, layers: Sequence[nn.Module], tied: bool) -> list[Any]:
        """Return the layer specs that DeepSpeed partitions. A tied embedding is both the first and the last spec."""
        first, *middle, head = layers
        if not tied:
            return [first, *middle, _HeadWithLoss(head, self._loss)]
        tied_head = _ExistingTiedLayer(first, lambda _, hidden, context: self._loss(head, hidden))
        return [_ExistingTiedLayer(first), *middle, tied_head]

    def _build(self) -> None:
        """Create the layers of this stage.

        Overrides a method of PipelineModule. The constructor calls it after creating the process groups, which
        tensor-parallel layers need.
        """
        self._layer_specs = self._specs(self._create_layers(), self._recipe.model.tie_embeddings)
        super()._build()

    def _create_layers(self) -> list[nn.Module]:
        """Return all layers of the model. The layers of other stages stay on the meta device."""
        section, layout = self._recipe.model, self._layout
        group = tensor.tensor_parallel_group(self.mpu(), layout, self._rank)
        with torch.device("meta"):
            layers = gpt.build_layers(section, tensor.parallel_layers(section, group, self._sequence))
        recompute(layers, layout.recomputed_blocks, layout.activations_on_host)
        for index in local_layers(section, layout, self._topo.get_coord(self.global_rank).pipe):
            names = tensor.init_tp_weights(
                layers[index], f"layers.{index}", section, self._recipe.seed, group.index, group.degree
            )
            self.names.update(zip(layers[index].parameters(), names, strict=True))
        return layers

    def _partition_layers(self, method: str = "") -> None:
        """Partition the layers by cost. The overridden method partitions by number of layers or of parameters."""
        self.parts = self._boundaries
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.parts[stage], self.parts[stage + 1])

    def _loss(self, head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Return the loss of the micro-batch that was fed last.

        The loss is computed in the module's forward pass and not in DeepSpeed's `loss_fn`. BF16_Optimizer clears all
        gradients when the backward pass reaches the module's output, so parameters used in `loss_fn` would not be
        trained (test_in_bf16_a_parameter_used_in_loss_fn_is_not_trained).
        """
        assert self._labels is not None  # DeepSpeed loads each micro-batch before the forward pass of the last stage
        total: torch.Tensor = head(hidden, self._labels.to(hidden.device, non_blocking=True))
        if not self.training:
            self.loss_sum = self.loss_sum.to(total.device) + total.detach()
            return total
        loss = total / self.normalizer
        if not self._should_learn(loss.detach()):
            loss.register_hook(lambda gradient: gradient * math.nan)  # DeepSpeed skips the step if a gradient is NaN
        return loss

    def _should_learn(self, loss: torch.Tensor) -> bool:
        """Add the loss of a micro-batch to the total.

        Returns whether to apply the update. This is always True before the last micro-batch of an update.
        """
        self._total_loss = self._total_loss.to(loss.device) + loss
        self._remaining -= 1
        if self._remaining:
            return True
        mean = self._total_loss / self._count
        torch.distributed.all_reduce(mean, group=self.mpu().get_data_parallel_group())
        self._mean_loss = float(mean / self.mpu().get_data_parallel_world_size())
        self._accepted = self._accept(self._mean_loss)
        return self._accepted


def local_layers(section: ModelSection, layout: Layout, stage: int) -> list[int]:
    """Return the indices of the layers that a stage holds, in order.

    The last stage of a tied model also holds the embedding (index 0).

    Args:
        section: The model section of the recipe.
        layout: The layout, which defines the number of pipeline stages.
        stage: Index of the stage, counted from 0.
    """
    boundaries = flops.boundaries(flops.layer_costs(section), layout.pipeline_stages)
    local = set(range(boundaries[stage], boundaries[stage + 1]))
    if section.tie_embeddings and stage == layout.pipeline_stages - 1:
        local.add(0)
    return sorted(local)


class _HeadWithLoss(nn.Module):
    """Last layer of the pipeline, which computes the loss from hidden states."""

    def __init__(self, head: nn.Module, loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.head = head
        self._loss = loss

    def forward(self, hidden: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Return the loss, a scalar, given hidden states [batch, seq, d_model]."""
        return self._loss(self.head, hidden)


class _ExistingTiedLayer(TiedLayerSpec):
    """Layer spec of a tied layer that already exists."""

    def __init__(self, layer: nn.Module, forward_fn: Any = None) -> None:
        super().__init__("embedding", type(layer), forward_fn=forward_fn)
        self._layer = layer

    def build(self, log: bool = False) -> nn.Module:
        """Return the existing layer."""
        return self._layer
