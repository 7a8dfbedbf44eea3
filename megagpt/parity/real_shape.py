"""Checks of the real model: whether its pipeline stages fit together, and whether the machines can make one update."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from megagpt.cluster import Collectives
from megagpt.config.deepspeed import Layout, Resolved
from megagpt.doctor import host_facts
from megagpt.engine import deepspeed_ops
from megagpt.engine.optim import build as optimizers
from megagpt.engine.parallel import pipeline_stages, tensor
from megagpt.model import flops, gpt
from megagpt.model.context import ContextBuilder
from megagpt.model.shapes import layer_shapes
from megagpt.model.sharding import shard_spec
from megagpt.plan.machine import Device
from megagpt.plan.memory import memory
from megagpt.plan.verdict import fit

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_FLOPS = 2e12
"""FLOPs that the CPUs of all ranks compute in one or two minutes in fp32. Low precision takes ten times as long."""


@dataclass(frozen=True)
class Stage:
    """One pipeline stage of the real model as a tensor-parallel rank holds it, built on the meta device.

    Attributes:
        kinds: kinds of the layers of the stage.
        groups: names of the parameters in each parameter group, with the kind of layer instead of its number.
        wrong_shards: messages about parameters whose shards have the wrong shape, one line each.
        output: shape and dtype of the tensor that the stage sends to the next stage.
    """

    kinds: tuple[str, ...]
    groups: list[frozenset[str]]
    wrong_shards: list[str]
    output: str


def build_stages(resolved: Resolved) -> list[Stage]:
    """Build every pipeline stage of a model on the meta device, which takes no memory and little time."""
    layout, section = resolved.layout, resolved.recipe.model
    whole, shards = _layers(resolved, 1), _layers(resolved, layout.tensor_parallel)
    built = []
    for number, kinds in enumerate(flops.stage_kinds(section, layout.pipeline_stages)):
        local = pipeline_stages.local_layers(section, layout, number)
        held = nn.ModuleDict({str(index): shards[index] for index in local})
        last = number == layout.pipeline_stages - 1
        output = "the loss" if last else _output(resolved, [whole[index] for index in local], number)
        built.append(Stage(kinds, _groups(resolved, held), _wrong_shards(resolved, held), output))
    return built


def same_stages(built: list[Stage], others: list[Stage]) -> bool:
    """Return True if two models have the same kinds of layer and the same parameter groups on each stage."""
    return [(stage.kinds, stage.groups) for stage in built] == [(stage.kinds, stage.groups) for stage in others]


def stage_problems(built: list[Stage], resolved: Resolved) -> list[str]:
    """Check that pipeline stages fit together.

    Args:
        built: The stages, from `build_stages`.
        resolved: The recipe and the DeepSpeed config from which they were built.

    Returns:
        The problems, one line each.
    """
    layout, section = resolved.layout, resolved.recipe.model
    lines = [line for stage in built for line in stage.wrong_shards]
    layers = enumerate(_layers(resolved, layout.tensor_parallel))
    whole = _groups(resolved, nn.ModuleDict({str(index): layer for index, layer in layers}))
    for number, stage in enumerate(built):
        matches = [[index for index, group in enumerate(whole) if mine <= group] for mine in stage.groups]
        if not matches or matches != sorted(matches) or any(len(match) != 1 for match in matches):
            lines.append(f"stage {number} ({', '.join(stage.kinds)}) has other parameter groups than the whole model")
    hidden = [layout.micro_batch, section.seq_len // layout.sequence_parallel, section.d_model]
    expected = f"{hidden} {resolved.recipe.precision or 'fp32'}"
    lines += [
        f"stage {number} sends {stage.output}, the next one expects {expected}"
        for number, stage in enumerate(built[:-1])
        if stage.output != expected
    ]
    return lines


def format_stage_kinds(kinds: list[tuple[str, ...]]) -> str:
    """Return the kinds of layer of all stages on one line. Equal neighboring stages are combined, with their count."""
    runs = [(" + ".join(kind), len(list(run))) for kind, run in groupby(kinds)]
    return " | ".join(f"{text} (×{number})" if number > 1 else text for text, number in runs)


def micro_batches(layout: Layout) -> int:
    """Return the number of micro-batches of the update of the real model: enough to fill a pipeline, and at least two.

    The number is not larger than the number of micro-batches of the layout.
    """
    return min(layout.accumulation, max(layout.pipeline_stages, 2))


def find_obstacle(one: Resolved, collectives: Collectives) -> str:
    """Return the reason why these machines cannot make an update of the real model, or "" if they can. Collective.

    Every rank returns the same text.

    Args:
        one: The real recipe and config, with only a few micro-batches per update.
        collectives: Collectives between all ranks.
    """
    ranks = collectives.all_gather_object(socket.gethostname()).count(socket.gethostname())
    on_cpu = deepspeed_ops.device() == "cpu"
    needed, available = memory(one, on_cpu), host_facts.memory()["available"]
    if on_cpu:
        found = fit(needed, Device("cpu", available // ranks), ranks, available)
    else:
        found = fit(needed, Device("gpu", torch.cuda.mem_get_info()[0]), ranks, available)
    mine = ""
    if found.is_bad:
        mine = (
            f"a rank needs {_gb(found.device_wanted)} of {_gb(found.device_memory or 0)} of its device, and a host "
            f"{_gb(found.host_wanted)} of {_gb(found.host_memory or 0)} of its memory"
        )
    elif on_cpu and (work := update_flops(one)) > _affordable_flops(one):
        mine = f"an update takes {work / 1e12:,.0f} TFLOP, too many for CPUs"
    return next((text for text in collectives.all_gather_object(mine) if text), "")


def update_flops(one: Resolved) -> float:
    """Return the total FLOPs of one update on all ranks."""
    section = one.recipe.model
    return flops.flops_per_token(section) * section.seq_len * one.recipe.batch.global_size


def can_repeat_in_one_process(one: Resolved) -> bool:
    """Return True if one process on a CPU can compute the same update of the real model in a reasonable time."""
    return one.recipe.model.dropout == 0 and update_flops(one) <= _affordable_flops(one)


def _affordable_flops(one: Resolved) -> float:
    return CPU_FLOPS if one.recipe.precision in (None, "fp32") else CPU_FLOPS / 10


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"


def _layers(resolved: Resolved, degree: int) -> list[nn.Module]:
    """Build all layers on the meta device, as a rank holds them with the tensor-parallel degree `degree`."""
    with torch.device("meta"):
        parallel = tensor.parallel_layers(resolved.recipe.model, tensor.TensorParallelGroup(degree=degree))
        return list(gpt.build_layers(resolved.recipe.model, parallel))


def _groups(resolved: Resolved, held: nn.ModuleDict) -> list[frozenset[str]]:
    """Return the parameter groups that the recipe's optimizer has for these layers."""
    kinds = flops.layer_kinds(resolved.recipe.model)
    names = {parameter: name.split(".", 1) for name, parameter in held.named_parameters()}
    groups = optimizers.build(resolved.recipe.optimizer, held, on_gpu=False).param_groups
    found = ((names[parameter] for parameter in group["params"]) for group in groups)
    return [frozenset(f"{kinds[int(index)]}.{name}" for index, name in group) for group in found]


def _wrong_shards(resolved: Resolved, held: nn.ModuleDict) -> list[str]:
    """Return one message per parameter whose shard has a different shape than the rank must hold."""
    section, degree = resolved.recipe.model, resolved.layout.tensor_parallel
    shapes = {name: list(shape) for layer in layer_shapes(section) for name, shape in layer.items()}
    lines = []
    for name, parameter in held.named_parameters(prefix="layers"):
        cut, expected = shard_spec(name, section, degree), [*shapes[name]]
        if cut is not None:
            expected[cut.dim] //= degree
        got = list(parameter.shape)
        if got != expected or (cut is not None and any(size % degree for size in cut.sections)):
            lines.append(f"{name} has shape {got} on a rank, which is not 1/{degree} of {shapes[name]}")
    return lines


def _output(resolved: Resolved, layers: Sequence[nn.Module], number: int) -> str:
    """Return shape and dtype of the output of these layers. Unsharded layers are used, as the output is not sharded."""
    layout, section = resolved.layout, resolved.recipe.model
    dtype = _DTYPES[resolved.recipe.precision or "fp32"]
    size = (layout.micro_batch, section.seq_len // layout.sequence_parallel)
    hidden = torch.empty(*size, section.d_model, dtype=dtype, device="meta")
    x = torch.zeros(size, dtype=torch.int64, device="meta") if number == 0 else hidden
    ids = torch.zeros(size, dtype=torch.int64, device="meta")
    context = ContextBuilder(section).for_batch(ids)
    with torch.no_grad():
        for layer in layers:
            x = layer.to(dtype)(x, context)
    names = {dtype: name for name, dtype in _DTYPES.items()}
    return f"{list(x.shape)} {names[x.dtype]}"
