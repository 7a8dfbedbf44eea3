"""Planted bugs in pipeline, tensor and sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from megagpt.data.loader import Batch
from megagpt.engine.optim import build, muon
from megagpt.engine.optim.muon_all_to_all import MuonAllToAll
from megagpt.engine.parallel import tensor
from megagpt.engine.parallel.pipeline_stages import PipelineStage
from megagpt.engine.parallel.ulysses import Ulysses
from megagpt.model.context import ContextBuilder, ForwardContext
from megagpt.model.sharding import ShardSpec
from tests.parity import layouts

Wrapper = Callable[..., Any]

PIPELINE = {"pipeline": {"stages": 2}, **layouts.zero(1, 3)}
TENSOR = {"tensor_parallel": {"autotp_size": 2}, **layouts.zero(1, 3)}
SEQUENCE = {"sequence_parallel_size": 2, **layouts.zero(1, 3)}


def _mean_of_means(original: Wrapper, stages: PipelineStage, head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    valid = int((stages._labels != -100).sum())
    return original(stages, head, hidden) * (stages.normalizer / valid)


def _last_ignored(original: Wrapper, stages: PipelineStage, batches: list[Batch], *args: Any) -> Iterator[Batch]:
    *kept, last = batches
    return original(stages, [*kept, Batch(last.input_ids, torch.full_like(last.labels, -100))], *args)


def _tied_counted_twice(original: Wrapper, section: Any, model: nn.Module, *, on_gpu: bool) -> Any:
    for parameter in model.parameters():
        parameter.ds_pipe_replicated = False
    return original(section, model, on_gpu=on_gpu)


def _parts_counted_once(original: Wrapper, module: nn.Module, *args: Any) -> Any:
    names = original(module, *args)
    for parameter in module.parameters():
        parameter.tensor_model_parallel = False
    return names


def _bias_from_each_part(original: Wrapper, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return tensor.ReduceFromTensorParallelRegion.apply(F.linear(x, layer.weight, layer.bias), layer.group)


def _torn_heads(original: Wrapper, name: str, section: Any, degree: int) -> ShardSpec | None:
    cut = original(name, section, degree)
    return cut if cut is None else ShardSpec(cut.dim, (sum(cut.sections),))


def _at_the_start(original: Wrapper, contexts: ContextBuilder, *args: Any) -> ForwardContext:
    context = original(contexts, *args)
    return replace(context, position_ids=context.position_ids - context.position_ids[0])


def _blind_to_the_others(original: Wrapper, ulysses: Ulysses, attend: Wrapper) -> Wrapper:
    return attend


def _first_part(original: Wrapper, ulysses: Ulysses, batch: Batch) -> Batch:
    return Batch(*(value.chunk(ulysses._degree, dim=1)[0] for value in batch))


def _each_its_own(original: Wrapper, exchange: MuonAllToAll, flat: torch.Tensor, *args: Any) -> None:
    with patch.object(exchange, "_all_to_all", lambda source, target, *_: target.zero_()):
        original(exchange, flat, *args)


def _parts_apart(original: Wrapper, exchange: MuonAllToAll, parts: torch.Tensor, cut: Any, solve: Any) -> Any:
    return solve(parts)


def _as_one(original: Wrapper, directions: torch.Tensor, parts: int) -> torch.Tensor:
    return original(directions, 1)


BUGS: dict[str, tuple[dict[str, Any], Any, str, Wrapper]] = {
    "pipeline-averages-micro-batches": (PIPELINE, PipelineStage, "_loss", _mean_of_means),
    "pipeline-drops-the-last-micro-batch": (PIPELINE, PipelineStage, "feed", _last_ignored),
    "pipeline-ties-no-gradients": (PIPELINE, PipelineStage, "get_tied_weights_and_groups", lambda *_: []),
    "pipeline-counts-the-tied-matrix-twice": (PIPELINE, build, "build", _tied_counted_twice),
    "tensor-counts-parts-once": (TENSOR, tensor, "init_tp_weights", _parts_counted_once),
    "tensor-does-not-sum-gradients": (
        TENSOR,
        tensor.CopyToTensorParallelRegion,
        "backward",
        lambda _, context, gradient: (gradient, None),
    ),
    "tensor-adds-a-bias-from-each-part": (TENSOR, tensor.RowParallelLinear, "forward", _bias_from_each_part),
    "tensor-tears-heads": (TENSOR, tensor, "shard_spec", _torn_heads),
    "sequence-parts-all-begin-at-0": (SEQUENCE, ContextBuilder, "for_batch", _at_the_start),
    "sequence-parts-are-blind-to-each-other": (SEQUENCE, Ulysses, "distribute", _blind_to_the_others),
    "sequence-parts-read-the-same": (SEQUENCE, Ulysses, "shard_batch", _first_part),
}
MUON_BUGS: dict[str, tuple[dict[str, Any], Any, str, Wrapper]] = {
    "muon-uses-only-its-own-range-of-a-matrix": (layouts.zero(2, 3), MuonAllToAll, "replace_by_updates", _each_its_own),
    "muon-takes-tensor-parts-for-matrices": (TENSOR, MuonAllToAll, "_local_updates", _parts_apart),
    "muon-takes-q-k-and-v-for-one-matrix": (layouts.zero(3, 3), muon, "updates", _as_one),
}
