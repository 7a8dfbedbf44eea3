"""The ZeRO engine: data parallelism, with optimizer, gradients and parameters sharded by stage."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

from megagpt.cluster import Collectives, Rank
from megagpt.config.deepspeed import Resolved
from megagpt.config.recipe import Recipe
from megagpt.data.loader import Batch
from megagpt.engine import deepspeed_patches, grad_norm, offload
from megagpt.engine.base import Accept, AtStep, ShouldStop, ignore_step, never_stop
from megagpt.engine.init_deepspeed import stop
from megagpt.engine.init_model import check_device, materialise, recompute
from megagpt.engine.optim import build as optimizers
from megagpt.engine.optim import lr_schedule as schedules
from megagpt.engine.parallel import tensor
from megagpt.engine.parallel.ulysses import Ulysses
from megagpt.engine.state import loss_scale, replica_check
from megagpt.engine.state.portable import Portable
from megagpt.engine.state.rng_and_loss_scale import SideState
from megagpt.files import WriteFile
from megagpt.model.gpt import GPT
from megagpt.model.sharding import shard_spec
from megagpt.state import IGNORE_INDEX, UpdateResult


class ZeroEngine:
    """An `Engine` on deepspeed.initialize, stages 0 to 3."""

    def __init__(self, resolved: Resolved, total_updates: int, rank: Rank, collectives: Collectives) -> None:
        recipe = resolved.recipe
        check_device(recipe, resolved.config)
        self._rank, self._collectives, self._layout, self._section = rank, collectives, resolved.layout, recipe.model
        self._grid: Any = tensor.grid(resolved.layout) if resolved.layout.tensor_parallel > 1 else None
        self._ulysses = Ulysses(resolved.layout, rank.rank)
        shards = resolved.layout.data_parallel * resolved.layout.sequence_parallel
        config = offload.ready(deepspeed_patches.config(resolved), recipe, shards)
        self._swap = offload.swap_folders(config, rank.rank)
        model = self._model(recipe, config)
        optimizer = optimizers.build(recipe.optimizer, model, on_gpu=offload.steps_on_gpu(config))
        self._clip: _ClipBeforeStep | None = None
        if resolved.layout.zero_stage == 0:
            # stage 0 in fp32 neither reports the norm nor clips by a way that could
            self._clip = _ClipBeforeStep(model, optimizer, recipe.optimizer.clip)
            config["gradient_clipping"] = 0.0
        self._engine: Any = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lambda basic: schedules.build(recipe.schedule, basic, total_updates, recipe.optimizer.lr),
            config=config,
            mpu=self._grid,
            dist_init_required=False,
        )[0]
        parts = tensor.parts(self._grid, resolved.layout, rank.rank)
        optimizers.connect(self._engine, self._names(), recipe.model, parts)
        loss_scale.ready(self._engine.optimizer)
        grad_norm.configure(self._engine.optimizer)

    def _model(self, recipe: Recipe, config: dict[str, Any]) -> GPT:
        """The model with its initial weights, or this rank's share of it."""
        parts = tensor.parts(self._grid, self._layout, self._rank.rank)
        parallel = tensor.parallel_layers(recipe.model, parts, self._ulysses.shard)
        if self._grid is None:
            model = materialise(recipe, config, self._layout.zero_stage, parallel)
        else:
            model = tensor.materialise(recipe, parts, parallel)
        recompute(model.layers, self._layout.recomputed_blocks, self._layout.activations_on_host)
        return model

    def train_update(
        self, batches: Sequence[Batch], accept: Accept = math.isfinite, at_step: AtStep = ignore_step
    ) -> UpdateResult:
        """One update; see `Engine`. The loss is the sum over the global batch's valid tokens by their number."""
        batches = [self._ulysses.part(batch) for batch in batches]
        tokens = self._total(sum(_valid(batch) for batch in batches))
        lr = self._engine.optimizer.param_groups[0]["lr"]
        # DeepSpeed averages over ranks and micro-batches: this share makes its average the sum over all by `tokens`.
        # (backward(scale_wrt_gas=False) would save a factor, but at stage 0 DeepSpeed 0.19 still divides.)
        parts = self._layout.data_parallel * self._layout.sequence_parallel * self._layout.accumulation
        before = SideState(self._engine.optimizer)
        total, loss, accepted = torch.zeros((), device=self._engine.device), 0.0, True
        for number, batch in enumerate(batches, start=1):
            part = self._forward(batch, max(tokens, 1.0) / parts)
            total += part.detach()
            if number == len(batches):
                loss = self._sum(total) / parts
                accepted = accept(loss)
                at_step()
                part = part if accepted else part * math.nan  # DeepSpeed steps on no gradient that is not finite
            self._engine.backward(part)
            self._engine.step()
        made = self._engine.was_step_applied()
        if not made:
            deepspeed_patches.take_back(self._engine, before, with_scale=not accepted)
        norm = float(self._clip.norm if self._clip else self._engine.get_global_grad_norm())
        return UpdateResult(loss, norm, lr, int(tokens), made, before.scale)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], should_stop: ShouldStop = never_stop) -> float | None:
        """See `Engine`."""
        self._engine.eval()
        loss, tokens = torch.zeros((), device=self._engine.device, dtype=torch.float64), 0
        stopped = False
        for batch in map(self._ulysses.part, batches):
            stopped = should_stop()
            if stopped:
                break
            loss += self._forward(batch, 1.0).double()
            tokens += _valid(batch)
        self._engine.train()
        return None if stopped else self._sum(loss) / max(self._total(tokens), 1.0)

    def save_state(self, sink: WriteFile) -> None:
        """See `Engine`."""
        self._portable().save(sink)

    def load_state(self, folder: Path) -> None:
        """See `Engine`. Raises UserError where the state does not arrive whole."""
        self._portable().load(folder, self._idle_update)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine`: collective above stage 0; the fp32 master where precision is lower."""
        for name, parameter in self._engine.module.named_parameters():
            whole = parameter if self._layout.zero_stage == 0 else safe_get_full_fp32_param(parameter)
            if self._grid is not None:
                degree, group = self._layout.tensor_parallel, self._grid.get_slice_parallel_group()
                whole = whole.to(self._engine.device)  # where it is offloaded, it comes on the host
                whole = tensor.whole(whole, shard_spec(name, self._section, degree), group, degree)
            yield name, whole.detach().float().cpu().contiguous()

    def replicas_differ(self) -> list[str]:
        """See `Engine`. At stage 3 no two ranks hold the same weights."""
        names = {} if self._layout.zero_stage == 3 else self._names()
        return replica_check.differences(names, self._section, self._layout, self._rank, self._collectives)

    def release(self) -> None:
        """Free what DeepSpeed holds; the process group stays, for another engine."""
        deepspeed_patches.release(self._engine)
        offload.clear(self._swap)

    def close(self) -> None:
        """See `Engine`."""
        with contextlib.suppress(AttributeError):
            self.release()
        stop()

    def _forward(self, batch: Batch, normalizer: float) -> torch.Tensor:
        """The loss of one micro-batch: its sum over valid tokens by `normalizer`."""
        to = {"device": self._engine.device, "non_blocking": True}
        output = self._engine(input_ids=batch.input_ids.to(**to), labels=batch.labels.to(**to), normalizer=normalizer)
        loss: torch.Tensor = output.loss
        return loss

    def _names(self) -> dict[torch.nn.Parameter, str]:
        return {parameter: name for name, parameter in self._engine.module.named_parameters()}

    def _portable(self) -> Portable:
        return Portable(self._engine, self._names(), self._section, self._layout, self._rank, self._collectives)

    def _idle_update(self) -> None:
        """An update in which no label is valid: its gradient is zero."""
        ids = torch.zeros((self._layout.micro_batch, self._section.seq_len), dtype=torch.int64)
        self.train_update([Batch(ids, torch.full_like(ids, IGNORE_INDEX))] * self._layout.accumulation)

    def _sum(self, value: torch.Tensor) -> float:
        """The sum over the data-parallel ranks, on the host."""
        if self._layout.world_size > 1:
            torch.distributed.all_reduce(value)
        return float(value.item()) / self._layout.tensor_parallel

    def _total(self, value: float) -> float:
        """The sum over the data-parallel ranks of a number that all tensor-parallel ranks have."""
        return self._collectives.all_reduce_sum(value) / self._layout.tensor_parallel


class _ClipBeforeStep:
    """Clips the whole model's gradient just before the optimizer steps, and keeps the norm before clipping.

    A gradient that is not finite is taken away, so that the optimizer has nothing to do; DeepSpeed then finds the
    attribute by which its own optimizers say so, and leaves the schedule where it is.
    """

    def __init__(self, model: GPT, optimizer: Any, limit: float | None) -> None:
        self._parameters, self._optimizer, self._limit = list(model.parameters()), optimizer, limit
        self.norm = 0.0
        optimizer.register_step_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.norm = grad_norm.clip(self._parameters, self._limit)
        self._optimizer.overflow = not math.isfinite(self.norm)
        if self._optimizer.overflow:
            for parameter in self._parameters:
                parameter.grad = None


def _valid(batch: Batch) -> int:
    return int((batch.labels != IGNORE_INDEX).sum())
