"""The ZeRO engine, which partitions optimizer states, gradients and parameters depending on the ZeRO stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param

from megagpt.cluster import Collectives, Rank
from megagpt.config.deepspeed import Resolved
from megagpt.data.loader import Batch
from megagpt.engine import deepspeed_patches, offload
from megagpt.engine.base import Accept, AtStep, ShouldStop, never_stop
from megagpt.engine.init_model import init_model, recompute
from megagpt.engine.optim import build as optimizers
from megagpt.engine.parallel import tensor
from megagpt.engine.wrapper import DeepSpeedWrapper, deepspeed_config, valid_tokens
from megagpt.model.gpt import GPT
from megagpt.model.sharding import shard_spec


class ZeroEngine(DeepSpeedWrapper):
    """An `Engine` without a pipeline, for ZeRO stages 0 to 3."""

    def __init__(self, resolved: Resolved, total_updates: int, rank: Rank, collectives: Collectives) -> None:
        super().__init__(resolved, rank, collectives)
        recipe, layout = resolved.recipe, resolved.layout
        self._grid: Any = tensor.create_grid(layout) if layout.tensor_parallel > 1 else None
        self._tensor_parallel = tensor.tensor_parallel_group(self._grid, layout, rank.rank)
        config = offload.configure_nvme(deepspeed_config(resolved), recipe, layout.zero_partitions)
        self._swap_folders = offload.clear_swap_folders(config, rank.rank)
        model = self._init_model(config)
        optimizer = optimizers.build(recipe.optimizer, model, on_gpu=offload.steps_on_gpu(config))
        self._clipping: deepspeed_patches.ClipBeforeStep | None = None
        if layout.zero_stage == 0:
            self._clipping = deepspeed_patches.ClipBeforeStep(model, optimizer, recipe.optimizer.clip)
            config["gradient_clipping"] = 0.0
        self._initialize(model, optimizer, config, total_updates, self._grid)

    def _init_model(self, config: dict[str, Any]) -> GPT:
        """Build the model, or this rank's tensor-parallel shard of it, with its initial weights."""
        parallel = tensor.parallel_layers(self._section, self._tensor_parallel, self._ulysses.shard)
        if self._layout.tensor_parallel == 1:
            model = init_model(self._recipe, config, self._layout.zero_stage, parallel)
        else:
            model = tensor.init_tp_model(self._recipe, self._tensor_parallel, parallel)
        recompute(model.layers, self._layout.recomputed_blocks, self._layout.activations_on_host)
        return model

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], should_stop: ShouldStop = never_stop) -> float | None:
        """See `Engine`."""
        self._engine.eval()
        loss = torch.zeros((), device=self._engine.device, dtype=torch.float64)
        tokens = 0
        stopped = False
        for batch in map(self._ulysses.shard_batch, batches):
            stopped = should_stop()
            if stopped:
                break
            loss += self._forward(batch, 1.0).double()
            tokens += valid_tokens(batch)
        self._engine.train()
        return None if stopped else self._sum_over_ranks(loss) / max(self._total_tokens(tokens), 1.0)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine`. Collective above stage 0. In low precision, yields the fp32 master weights."""
        for name, parameter in self._engine.module.named_parameters():
            weight = parameter if self._layout.zero_stage == 0 else safe_get_full_fp32_param(parameter)
            spec = shard_spec(name, self._section, self._layout.tensor_parallel)
            if spec is not None:
                weight = weight.to(self._engine.device)  # an offloaded weight is in host memory
                weight = tensor.gather_shards(weight, spec, self._tensor_parallel)
            yield name, weight.detach().float().cpu().contiguous()

    def release(self) -> None:
        """See `Engine`. Also removes this rank's files on NVMe."""
        super().release()
        offload.remove_swap_folders(self._swap_folders)

    def _forward_backward(
        self, batches: Sequence[Batch], normalizer: float, accept: Accept, at_step: AtStep
    ) -> tuple[float, bool]:
        total = torch.zeros((), device=self._engine.device)
        loss = 0.0
        accepted = True
        for number, batch in enumerate(batches, start=1):
            micro_batch_loss = self._forward(batch, normalizer)
            total += micro_batch_loss.detach()
            if number == len(batches):
                loss = self._sum_over_ranks(total) / (self._layout.zero_partitions * self._layout.accumulation)
                accepted = accept(loss)
                at_step()
                if not accepted:
                    micro_batch_loss = micro_batch_loss * math.nan  # DeepSpeed skips the step if a gradient is NaN
            self._engine.backward(micro_batch_loss)
            self._engine.step()
        return loss, accepted

    def _forward(self, batch: Batch, normalizer: float) -> torch.Tensor:
        """Return the sum of the loss over the valid tokens of one micro-batch, divided by `normalizer`."""
        device = self._engine.device
        input_ids = batch.input_ids.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        loss: torch.Tensor = self._engine(input_ids=input_ids, labels=labels, normalizer=normalizer).loss
        return loss

    def _names(self) -> Mapping[torch.nn.Parameter, str]:
        return {parameter: name for name, parameter in self._engine.module.named_parameters()}

    def _replicated_names(self) -> Mapping[torch.nn.Parameter, str]:
        # At stage 3, no two ranks hold the same weights.
        return {} if self._layout.zero_stage == 3 else self._names()

    def _grad_norm(self) -> float:
        return self._clipping.norm if self._clipping else super()._grad_norm()

    def _sum_over_ranks(self, value: torch.Tensor) -> float:
        """Return the sum of a value on the device over the data-parallel and sequence-parallel ranks."""
        if self._layout.world_size > 1:
            torch.distributed.all_reduce(value)
        return float(value.item()) / self._layout.tensor_parallel
