"""The pipeline engine: the layers cut into stages, each on its own ranks, micro-batches flowing through them.

Optimizer states are sharded over the data-parallel ranks of a stage (ZeRO-1), always: without ZeRO, DeepSpeed
would clip each stage by its own gradient norm.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
from deepspeed.utils import safe_get_full_fp32_param

from megagpt.cluster import Collectives, Rank
from megagpt.config.deepspeed import Resolved
from megagpt.data.loader import Batch
from megagpt.engine import deepspeed_patches, grad_norm, offload
from megagpt.engine.base import Accept, AtStep, ShouldStop, ignore_step, never_stop
from megagpt.engine.init_deepspeed import stop
from megagpt.engine.init_model import check_device
from megagpt.engine.optim import build as optimizers
from megagpt.engine.optim import lr_schedule as schedules
from megagpt.engine.parallel import tensor
from megagpt.engine.parallel.pipeline_stages import Stages
from megagpt.engine.parallel.ulysses import Ulysses
from megagpt.engine.state import loss_scale, replica_check
from megagpt.engine.state.portable import Portable
from megagpt.engine.state.rng_and_loss_scale import SideState
from megagpt.engine.vectors import whole_vectors
from megagpt.files import WriteFile
from megagpt.model.gpt import GPT
from megagpt.model.sharding import shard_spec
from megagpt.state import IGNORE_INDEX, UpdateResult


class PipelineEngine:
    """An `Engine` on DeepSpeed's PipelineModule. All ranks of one pipeline are given the same batches."""

    def __init__(self, resolved: Resolved, total_updates: int, rank: Rank, collectives: Collectives) -> None:
        recipe, layout = resolved.recipe, resolved.layout
        check_device(recipe, resolved.config)
        self._rank, self._collectives, self._layout, self._section = rank, collectives, layout, recipe.model
        self._ulysses = Ulysses(layout, rank.rank)
        self._stages = Stages(recipe, layout, rank.rank, self._ulysses.shard)
        optimizer = optimizers.build(recipe.optimizer, self._stages, on_gpu=offload.steps_on_gpu(resolved.config))
        pipeline = {"pipe_partitioned": False, "grad_partitioned": False}
        config = deepspeed_patches.config(resolved)
        config["pipeline"] = {**config.get("pipeline", {}), **pipeline}
        with whole_vectors():
            self._engine: Any = deepspeed.initialize(
                model=self._stages,
                optimizer=optimizer,
                lr_scheduler=lambda basic: schedules.build(recipe.schedule, basic, total_updates, recipe.optimizer.lr),
                config=config,
                dist_init_required=False,
            )[0]
        parts = tensor.parts(self._stages.mpu(), layout, rank.rank)
        optimizers.connect(self._engine, self._stages.names, recipe.model, parts)
        loss_scale.ready(self._engine.optimizer)
        grad_norm.configure(self._engine.optimizer)
        self._at_step: AtStep = ignore_step
        self._report_step()

    def train_update(
        self, batches: Sequence[Batch], accept: Accept = math.isfinite, at_step: AtStep = ignore_step
    ) -> UpdateResult:
        """One update; see `Engine`. The loss is the sum over the global batch's valid tokens by their number."""
        batches = [self._ulysses.part(batch) for batch in batches]
        tokens = self._tokens(batches)
        lr = self._engine.optimizer.param_groups[0]["lr"]
        # DeepSpeed averages over micro-batches and data-parallel ranks: their number makes it a sum again
        parts = self._layout.data_parallel * self._layout.sequence_parallel * len(batches)
        self._stages.expect(batches)
        self._stages.normalizer = max(tokens, 1.0) / parts
        before = SideState(self._engine.optimizer)
        self._at_step = at_step
        self._engine.train_batch(self._stages.feed(batches, accept))
        loss, accepted = self._stages.loss_and_verdict()
        made = self._engine.was_step_applied()
        if not made:
            deepspeed_patches.take_back(self._engine, before, with_scale=not accepted)
        norm = float(self._engine.get_global_grad_norm())
        return UpdateResult(loss, norm, lr, int(tokens), made, before.scale)

    def evaluate(self, batches: Iterable[Batch], should_stop: ShouldStop = never_stop) -> float | None:
        """See `Engine`. No batch may be larger than in training."""
        self._stages.loss_sum = torch.zeros((), dtype=torch.float64)
        tokens, coming = 0.0, map(self._ulysses.part, batches)
        while part := [self._shaped(batch) for batch in islice(coming, 4 * self._layout.pipeline_stages)]:
            if should_stop():
                return None
            tokens += self._tokens(part)
            self._stages.expect(part)
            fed = self._stages.feed(part)
            self._engine.eval_batch(fed, reduce_output=None, bcast_loss=False, num_micro_batches=len(part))
        loss = self._collectives.all_reduce_sum(float(self._stages.loss_sum)) / self._layout.tensor_parallel
        return loss / max(tokens, 1.0)

    def save_state(self, sink: WriteFile) -> None:
        """See `Engine`."""
        self._portable().save(sink)

    def load_state(self, folder: Path) -> None:
        """See `Engine`. Raises UserError where the state does not arrive whole."""
        self._portable().load(folder, self._idle_update)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine`: collective, whole on every rank, one parameter after the other."""
        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in GPT(self._section).named_parameters()}
        mine = {name: parameter for parameter, name in self._stages.names.items()}
        degree = self._layout.tensor_parallel
        grid = self._stages.mpu()
        for name, shape in shapes.items():
            owner = grid.stage_to_global(self._stages.stage_owner(int(name.split(".")[1])))
            whole = torch.empty(shape, device=self._engine.device)
            if self._rank.rank == owner:
                part = safe_get_full_fp32_param(mine[name]).detach().float().to(whole.device)  # offloaded: on the host
                cut = shard_spec(name, self._section, degree)
                whole = tensor.whole(part, cut, grid.get_slice_parallel_group(), degree).contiguous()
            torch.distributed.broadcast(whole, owner, group=grid.get_pipe_parallel_group())
            yield name, whole.cpu()

    def replicas_differ(self) -> list[str]:
        """See `Engine`. The copies of a tied matrix are on the first and the last stage."""
        return replica_check.differences(self._stages.names, self._section, self._layout, self._rank, self._collectives)

    def release(self) -> None:
        """Free what DeepSpeed holds; the process group stays, for another engine."""
        deepspeed_patches.release(self._engine)

    def close(self) -> None:
        """See `Engine`."""
        with contextlib.suppress(AttributeError):
            self.release()
        stop()

    def _report_step(self) -> None:
        """Call `_at_step` on every stage after its last backward pass: DeepSpeed reduces tied gradients then."""
        instructions = self._engine._INSTRUCTION_MAP
        reduce = instructions[ReduceTiedGrads]

        def report_and_reduce(engine: Any) -> None:
            self._at_step()
            reduce(engine)

        self._engine._INSTRUCTION_MAP = {**instructions, ReduceTiedGrads: report_and_reduce}

    def _tokens(self, batches: Sequence[Batch]) -> float:
        """The valid target tokens of all data-parallel ranks."""
        mine = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
        return self._collectives.all_reduce_sum(mine) / (self._layout.pipeline_stages * self._layout.tensor_parallel)

    def _portable(self) -> Portable:
        names, stage = self._stages.names, self._stages.stage_id
        copies = {name for name in names.values() if self._stages.stage_owner(int(name.split(".")[1])) != stage}
        layout = self._layout
        return Portable(self._engine, names, self._section, layout, self._rank, self._collectives, frozenset(copies))

    def _idle_update(self) -> None:
        """An update in which no label is valid: its gradient is zero."""
        ids = torch.zeros((self._layout.micro_batch, self._section.seq_len), dtype=torch.int64)
        self.train_update([Batch(ids, torch.full_like(ids, IGNORE_INDEX))] * self._layout.accumulation)

    def _shaped(self, batch: Batch) -> Batch:
        """The batch filled up with ignored samples to the shape of training: stages agree on it only once."""
        missing = self._layout.micro_batch - len(batch.labels)
        return Batch(
            F.pad(batch.input_ids, (0, 0, 0, missing)), F.pad(batch.labels, (0, 0, 0, missing), value=IGNORE_INDEX)
        )
