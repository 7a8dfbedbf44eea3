"""What a run takes besides memory: tokens, FLOPs, time, traffic, disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.config import recipe as recipes
from megagpt.corpus.metadata import bytes_per_token, read_sidecar
from megagpt.model import flops as cost
from megagpt.plan import machine, muon
from megagpt.plan.states import MASTER_AND_MOMENTS, Zero, held

if TYPE_CHECKING:
    from megagpt.config.deepspeed import Resolved

_FP32 = 4


@dataclass(frozen=True)
class Length:
    """How long training is; updates and tokens are None where they hang on a corpus that is not there."""

    updates: int | None
    tokens_per_update: int
    tokens: int | None
    flops: float | None
    """of the model, forward and backward; recomputation not counted"""


@dataclass(frozen=True)
class Time:
    """Seconds at the highest and the lowest utilisation that was published for the like of this layout."""

    shortest: float
    longest: float
    device_hours: tuple[float, float]
    utilisation: tuple[float, float]
    source: str


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an update, by what for; of the ranks that send most."""

    data_parallel: int
    tensor_parallel: int
    pipeline: int
    sequence_parallel: int


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk that all ranks share."""

    checkpoint: int
    checkpoints: int | None
    """of all that are kept, and one being written; None: more with every save"""
    corpus: int | None
    """if each token is read once"""


def length(resolved: Resolved) -> Length:
    """Updates and tokens of the recipe; epochs need the corpora's sidecars."""
    recipe = resolved.recipe
    per_update = recipe.batch.global_size * recipe.model.seq_len
    updates = None
    if recipe.length.epochs is None:
        updates = recipes.total_updates(recipe, 0)
    else:
        sizes = [read_sidecar(Path(f"{source.path}.json")) for source in recipe.data.train]
        known = [size.tokens for size in sizes if size is not None]
        if len(known) == len(sizes):
            updates = recipes.total_updates(recipe, sum(known) // recipe.model.seq_len)
    if updates is None:
        return Length(None, per_update, None, None)
    tokens = updates * per_update
    return Length(updates, per_update, tokens, tokens * cost.flops_per_token(recipe.model))


def time(resolved: Resolved, flops: float | None, name: str) -> Time | None:
    """FLOPs over ranks, peak and utilisation; None where one of them is not known, as with offload."""
    recipe, layout = resolved.recipe, resolved.layout
    peak = machine.peak(name, recipe.precision or "fp32")
    reached = machine.utilisation(name, layout, recipe.model.n_layer)
    if flops is None or peak is None or reached is None or Zero(resolved).offloads:
        return None
    fastest, slowest = (flops / (layout.world_size * peak * share) for share in (reached.high, reached.low))
    hours = tuple(seconds * layout.world_size / 3600 for seconds in (fastest, slowest))
    return Time(fastest, slowest, (hours[0], hours[1]), (reached.low, reached.high), reached.source)


def traffic(resolved: Resolved) -> Traffic:
    """Rings: a sum over n ranks sends 2(n - 1)/n of its bytes, a gathering or scattering (n - 1)/n.

    ZeRO section 7 (arXiv 1910.02054), Megatron (arXiv 1909.08053), Ulysses (arXiv 2309.14509).
    """
    layout, section = resolved.layout, resolved.recipe.model
    zero = Zero(resolved)
    stages = range(layout.pipeline_stages)
    ranks = [held(section, layout, stage) for stage in stages]
    most = max(rank.total for rank in ranks)
    gathered, joined = max(muon.traffic(zero, rank) for rank in ranks) if zero.muon else (0, 0)
    hidden = layout.micro_batch * section.seq_len // layout.sequence_parallel * section.d_model * zero.element
    blocks = -(-section.n_layer // layout.pipeline_stages)
    again = layout.recomputed_blocks / section.n_layer
    # forward: after attention and MLP; backward: before qkv, up and gate, each summed by itself
    sums = 2 * (1 + again) + (3 if section.activation == "swiglu" else 2)
    ring = 2 * _ring(layout.tensor_parallel)
    kv_width = section.n_kv_head * (section.d_model // section.n_head)
    exchanged = hidden * 2 * (1 + kv_width / section.d_model)  # queries and mixed values, keys and values
    return Traffic(
        data_parallel=int(_data_parallel(zero, most)) + gathered,
        tensor_parallel=int(layout.accumulation * blocks * sums * ring * hidden) + joined,
        pipeline=layout.accumulation * hidden * min(layout.pipeline_stages - 1, 2),
        sequence_parallel=int(
            layout.accumulation * blocks * (2 + again) * _ring(layout.sequence_parallel) * exchanged
        ),
    )  # fmt: skip


def _data_parallel(zero: Zero, parameters: int) -> float:
    """Gradients and weights, between the ranks that hold the same part of the model."""
    low, reduced, part = zero.element * parameters, zero.reduced * parameters, _ring(zero.shards)
    stage, micro_batches = zero.layout.zero_stage, zero.layout.accumulation
    if stage == 0:
        return 2 * part * _FP32 * parameters
    if stage == 1:
        return part * (2 * reduced + low)  # DeepSpeed sums whole gradients here
    if stage == 2:
        return part * (reduced * micro_batches + low)
    return part * micro_batches * (2 * low + reduced)


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def disk(resolved: Resolved, tokens: int | None) -> Disk:
    """A checkpoint holds an fp32 weight and its moments, of Muon's matrices one; a corpus 2 or 4 bytes a token."""
    recipe = resolved.recipe
    one, kept = MASTER_AND_MOMENTS * cost.parameters(recipe.model), recipe.checkpoint.keep_last
    if recipe.optimizer.type == "muon":
        one -= _FP32 * sum(map(muon.elements, cost.shapes(recipe.model)))
    endless = kept is None or recipe.checkpoint.keep_every is not None
    read = None if tokens is None else tokens * bytes_per_token(recipe.model.vocab_size)
    return Disk(one, None if endless or kept is None else (kept + 1) * one, read)


def days(seconds: float) -> str:
    """A time in the unit that suits it."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {name}"
    return f"{math.ceil(seconds)} seconds"
