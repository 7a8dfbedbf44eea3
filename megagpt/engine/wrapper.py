"""Base class of the ZeRO engine and the pipeline engine, which wrap the engine that deepspeed.initialize returns."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch

from megagpt.cluster import Collectives, Rank
from megagpt.config.deepspeed import Resolved
from megagpt.data.loader import Batch
from megagpt.engine import deepspeed_patches
from megagpt.engine.base import Accept, AtStep, ignore_step
from megagpt.engine.init_deepspeed import stop
from megagpt.engine.init_model import check_device
from megagpt.engine.optim import build as optimizers
from megagpt.engine.optim import lr_schedule
from megagpt.engine.parallel.tensor import TensorParallelGroup
from megagpt.engine.parallel.ulysses import Ulysses
from megagpt.engine.state import replica_check
from megagpt.engine.state.portable import PortableState
from megagpt.engine.state.rng_and_loss_scale import RngAndLossScaleSnapshot
from megagpt.files import WriteFile
from megagpt.state import IGNORE_INDEX, UpdateResult

# These keys are not passed to DeepSpeed. engine/parallel implements tensor and sequence parallelism. DeepSpeed would
# reject `train_batch_size`, because it counts sequence-parallel ranks as data-parallel ones and the recipe does not.
_OUR_KEYS = ("tensor_parallel", "sequence_parallel_size", "train_batch_size")


class DeepSpeedWrapper:
    """Base class of the engines, which runs updates on a DeepSpeed engine and saves and restores its state.

    A subclass must call `_initialize` at the end of its constructor.
    """

    _engine: Any
    _tensor_parallel: TensorParallelGroup

    def __init__(self, resolved: Resolved, rank: Rank, collectives: Collectives) -> None:
        check_device(resolved.recipe, resolved.config)
        self._recipe = resolved.recipe
        self._section = resolved.recipe.model
        self._layout = resolved.layout
        self._rank = rank
        self._collectives = collectives
        self._ulysses = Ulysses(resolved.layout, rank.rank)

    def _initialize(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        total_updates: int,
        grid: Any = None,
    ) -> None:
        """Call deepspeed.initialize and configure the optimizer that it returns.

        Args:
            model: The model, or the layers of a pipeline stage.
            optimizer: The optimizer of the model's parameters.
            config: The config for deepspeed.initialize.
            total_updates: Number of updates of the whole run, for the learning rate schedule.
            grid: DeepSpeed's grid of process groups for tensor parallelism, or None if the model creates its own.
        """
        recipe = self._recipe
        self._engine = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lambda inner: lr_schedule.build(recipe.schedule, inner, total_updates, recipe.optimizer.lr),
            config=config,
            mpu=grid,
            dist_init_required=False,
        )[0]
        optimizers.attach_muon_plans(self._engine, self._names(), recipe.model, self._tensor_parallel)
        deepspeed_patches.configure_loss_scale(self._engine.optimizer)
        deepspeed_patches.configure_grad_norm(self._engine.optimizer)

    def train_update(
        self, batches: Sequence[Batch], accept: Accept = math.isfinite, at_step: AtStep = ignore_step
    ) -> UpdateResult:
        """See `Engine`. The loss is the sum over the valid tokens of the global batch, divided by their number."""
        batches = [self._ulysses.shard_batch(batch) for batch in batches]
        tokens = self._total_tokens(sum(map(valid_tokens, batches)))
        lr = self._engine.optimizer.param_groups[0]["lr"]
        # DeepSpeed averages over ranks and micro-batches. With this divisor, its average is the mean over all tokens.
        # `backward(scale_wrt_gas=False)` should turn off the average over micro-batches, but at ZeRO stage 0 DeepSpeed
        # 0.19.8 ignores this option.
        normalizer = max(tokens, 1.0) / (self._layout.zero_partitions * self._layout.accumulation)
        snapshot = RngAndLossScaleSnapshot(self._engine.optimizer)
        loss, accepted = self._forward_backward(batches, normalizer, accept, at_step)
        applied = self._engine.was_step_applied()
        if not applied:
            deepspeed_patches.undo_skipped_step(self._engine, snapshot, with_loss_scale=not accepted)
        return UpdateResult(loss, self._grad_norm(), lr, int(tokens), applied, snapshot.loss_scale)

    def save_state(self, sink: WriteFile) -> None:
        """See `Engine`."""
        self._portable_state().save(sink)

    def load_state(self, folder: Path) -> None:
        """See `Engine`. Raises UserError if the restored state differs from the saved one."""
        self._portable_state().load(folder, self._empty_update)

    def replicas_differ(self) -> list[str]:
        """See `Engine`."""
        names = self._replicated_names()
        return replica_check.differences(names, self._section, self._layout, self._rank, self._collectives)

    def release(self) -> None:
        """See `Engine`."""
        deepspeed_patches.release(self._engine)

    def close(self) -> None:
        """See `Engine`."""
        with contextlib.suppress(AttributeError):  # `_engine` does not exist if the constructor failed
            self.release()
        stop()

    def _forward_backward(
        self, batches: Sequence[Batch], normalizer: float, accept: Accept, at_step: AtStep
    ) -> tuple[float, bool]:
        """Run all passes and the step of an update. Returns its loss, and whether the loss was accepted."""
        raise NotImplementedError

    def _names(self) -> Mapping[torch.nn.Parameter, str]:
        """Return the name in `GPT` of each parameter on this rank."""
        raise NotImplementedError

    def _replicated_names(self) -> Mapping[torch.nn.Parameter, str]:
        """Return the name in `GPT` of each parameter that other ranks may replicate."""
        return self._names()

    def _saved_elsewhere(self) -> frozenset[str]:
        """Return the names of parameters that another pipeline stage saves."""
        return frozenset()

    def _grad_norm(self) -> float:
        """Return the norm of the last gradient before clipping."""
        return float(self._engine.get_global_grad_norm())

    def _portable_state(self) -> PortableState:
        return PortableState(
            self._engine,
            self._names(),
            self._section,
            self._layout,
            self._rank,
            self._collectives,
            self._saved_elsewhere(),
        )

    def _empty_update(self) -> None:
        """Run an update without valid labels, whose gradient is zero."""
        ids = torch.zeros((self._layout.micro_batch, self._section.seq_len), dtype=torch.int64)
        self.train_update([Batch(ids, torch.full_like(ids, IGNORE_INDEX))] * self._layout.accumulation)

    def _total_tokens(self, local: int) -> float:
        """Return the sum of a token count over the data-parallel and sequence-parallel ranks. Collective."""
        return self._collectives.all_reduce_sum(local) / (self._layout.pipeline_stages * self._layout.tensor_parallel)


def valid_tokens(batch: Batch) -> int:
    """Return the number of target tokens in a batch that are not ignored by the loss."""
    return int((batch.labels != IGNORE_INDEX).sum())


def deepspeed_config(resolved: Resolved) -> dict[str, Any]:
    """Return the config for deepspeed.initialize, without the features that the engine implements itself."""
    return {key: value for key, value in resolved.config.items() if key not in _OUR_KEYS}
