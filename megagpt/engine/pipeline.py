"""The pipeline engine, which places the layers of each stage on different ranks.

Optimizer states are always partitioned over the data-parallel ranks of a stage (ZeRO-1). Without ZeRO, DeepSpeed would
clip the gradient of each stage by that stage's own norm
(test_without_zero_a_pipeline_is_not_clipped_by_the_norm_of_the_whole_gradient).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_fp32_param

from megagpt.cluster import Collectives, Rank
from megagpt.config.deepspeed import Resolved
from megagpt.data.loader import Batch
from megagpt.engine import deepspeed_patches, offload
from megagpt.engine.base import Accept, AtStep, ShouldStop, ignore_step, never_stop
from megagpt.engine.optim import build as optimizers
from megagpt.engine.parallel import tensor
from megagpt.engine.parallel.pipeline_stages import PipelineStage
from megagpt.engine.wrapper import DeepSpeedWrapper, deepspeed_config, valid_tokens
from megagpt.model.gpt import GPT
from megagpt.model.sharding import shard_spec
from megagpt.state import IGNORE_INDEX


class PipelineEngine(DeepSpeedWrapper):
    """An `Engine` that uses DeepSpeed's PipelineModule. All ranks of one pipeline must get the same batches."""

    def __init__(self, resolved: Resolved, total_updates: int, rank: Rank, collectives: Collectives) -> None:
        super().__init__(resolved, rank, collectives)
        recipe = resolved.recipe
        self._stage = PipelineStage(recipe, self._layout, rank.rank, self._ulysses.shard)
        self._tensor_parallel = tensor.tensor_parallel_group(self._stage.mpu(), self._layout, rank.rank)
        optimizer = optimizers.build(recipe.optimizer, self._stage, on_gpu=offload.steps_on_gpu(resolved.config))
        config = deepspeed_config(resolved)
        config["pipeline"] = {**config.get("pipeline", {}), "pipe_partitioned": False, "grad_partitioned": False}
        with deepspeed_patches.partitions_of_whole_vectors():
            self._initialize(self._stage, optimizer, config, total_updates)
        self._at_step: AtStep = ignore_step
        deepspeed_patches.call_before_tied_reduction(self._engine, lambda: self._at_step())

    def evaluate(self, batches: Iterable[Batch], should_stop: ShouldStop = never_stop) -> float | None:
        """See `Engine`. No batch may be larger than in training."""
        self._stage.loss_sum = torch.zeros((), dtype=torch.float64)
        tokens = 0.0
        sharded = map(self._ulysses.shard_batch, batches)
        while chunk := [self._pad(batch) for batch in islice(sharded, 4 * self._layout.pipeline_stages)]:
            if should_stop():
                return None
            tokens += self._total_tokens(sum(map(valid_tokens, chunk)))
            self._stage.register_batches(chunk)
            fed = self._stage.feed(chunk)
            self._engine.eval_batch(fed, reduce_output=None, bcast_loss=False, num_micro_batches=len(chunk))
        loss = self._collectives.all_reduce_sum(float(self._stage.loss_sum)) / self._layout.tensor_parallel
        return loss / max(tokens, 1.0)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine`. Collective. Every rank yields all parameters."""
        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in GPT(self._section).named_parameters()}
        local = {name: parameter for parameter, name in self._stage.names.items()}
        grid = self._stage.mpu()
        for name, shape in shapes.items():
            owner = grid.stage_to_global(self._owner(name))
            weight = torch.empty(shape, device=self._engine.device)
            if self._rank.rank == owner:
                # An offloaded weight is in host memory.
                shard = safe_get_full_fp32_param(local[name]).detach().float().to(weight.device)
                spec = shard_spec(name, self._section, self._layout.tensor_parallel)
                weight = tensor.gather_shards(shard, spec, self._tensor_parallel).contiguous()
            torch.distributed.broadcast(weight, owner, group=grid.get_pipe_parallel_group())
            yield name, weight.cpu()

    def _forward_backward(
        self, batches: Sequence[Batch], normalizer: float, accept: Accept, at_step: AtStep
    ) -> tuple[float, bool]:
        self._stage.register_batches(batches)
        self._stage.normalizer = normalizer
        self._at_step = at_step
        self._engine.train_batch(self._stage.feed(batches, accept))
        return self._stage.broadcast_loss()

    def _names(self) -> Mapping[torch.nn.Parameter, str]:
        return self._stage.names

    def _saved_elsewhere(self) -> frozenset[str]:
        # The first stage saves a tied matrix, so the last stage does not save its copy.
        return frozenset(name for name in self._stage.names.values() if self._owner(name) != self._stage.stage_id)

    def _owner(self, name: str) -> int:
        """Return the first stage that holds a parameter."""
        return int(self._stage.stage_owner(int(name.split(".")[1])))

    def _pad(self, batch: Batch) -> Batch:
        """Pad a batch with ignored samples to the shape of a training batch.

        DeepSpeed's pipeline stages exchange the shape of their tensors only once, so all batches need the same shape.
        """
        missing = self._layout.micro_batch - len(batch.labels)
        return Batch(
            F.pad(batch.input_ids, (0, 0, 0, missing)), F.pad(batch.labels, (0, 0, 0, missing), value=IGNORE_INDEX)
        )
