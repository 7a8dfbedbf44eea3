"""Estimates of the costs of a run other than memory: tokens, FLOPs, time, network traffic and disk space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.config import recipe as recipes
from megagpt.config.recipe.optimizers import OPTIMIZERS
from megagpt.corpus.metadata import read_sidecar
from megagpt.model import flops as cost
from megagpt.model.shapes import FP32_BYTES, layer_shapes
from megagpt.plan import machine, muon
from megagpt.plan.rank_state import ZeroSettings, local_parameters
from megagpt.tokenizer.id_dtype import bytes_per_token

if TYPE_CHECKING:
    from megagpt.config.deepspeed import Resolved


@dataclass(frozen=True)
class Length:
    """Length of training. Updates and tokens are None if they depend on a corpus that does not exist."""

    updates: int | None
    tokens_per_update: int
    tokens: int | None
    flops: float | None
    """FLOPs of the model's forward and backward passes, without recomputation"""


@dataclass(frozen=True)
class Time:
    """Time of a run in seconds, at the highest and the lowest utilization published for similar layouts."""

    shortest: float
    longest: float
    device_hours: tuple[float, float]
    utilization: tuple[float, float]
    source: str


@dataclass(frozen=True)
class Traffic:
    """Number of bytes that the rank with the most traffic sends per update, by kind of parallelism."""

    data_parallel: int
    tensor_parallel: int
    pipeline: int
    sequence_parallel: int


@dataclass(frozen=True)
class Disk:
    """Number of bytes on the disk that all ranks share."""

    checkpoint: int
    checkpoints: int | None
    """size of all checkpoints that are kept and of one being written; None if their number grows with every save"""
    corpus: int | None
    """size of the corpus if each token is read once; None if the number of tokens is not known"""


def length(resolved: Resolved) -> Length:
    """Return the length of training. If it is given in epochs, the sidecar files of the corpora are needed."""
    recipe = resolved.recipe
    per_update = recipe.batch.global_size * recipe.model.seq_len
    updates = None
    if recipe.length.epochs is None:
        updates = recipes.total_updates(recipe, 0)
    else:
        sidecars = [read_sidecar(Path(f"{source.path}.json")) for source in recipe.data.train]
        tokens_per_corpus = [sidecar.tokens for sidecar in sidecars if sidecar is not None]
        if len(tokens_per_corpus) == len(sidecars):
            updates = recipes.total_updates(recipe, sum(tokens_per_corpus) // recipe.model.seq_len)
    if updates is None:
        return Length(None, per_update, None, None)
    tokens = updates * per_update
    return Length(updates, per_update, tokens, tokens * cost.flops_per_token(recipe.model))


def time(resolved: Resolved, flops: float | None, device: str) -> Time | None:
    """Estimate the time of a run from its FLOPs, the number of ranks, and the device's peak FLOP/s and utilization.

    Args:
        resolved: the recipe, config and layout of the run.
        flops: FLOPs of the run; None if they are not known.
        device: name of the device.

    Returns:
        The time, or None if one of these factors is unknown, which is always the case with offload.
    """
    recipe, layout = resolved.recipe, resolved.layout
    peak = cost.peak_flops(device, recipe.precision or "fp32")
    reached = machine.utilization(device, layout, recipe.model.n_layer)
    if flops is None or peak is None or reached is None or ZeroSettings(resolved).offloads:
        return None
    shortest = flops / (layout.world_size * peak * reached.high)
    longest = flops / (layout.world_size * peak * reached.low)
    device_hours = (shortest * layout.world_size / 3600, longest * layout.world_size / 3600)
    return Time(shortest, longest, device_hours, (reached.low, reached.high), reached.source)


def traffic(resolved: Resolved) -> Traffic:
    """Return the number of bytes that a rank sends per update.

    All collectives are assumed to be rings. An all-reduce of s bytes over n ranks then sends 2(n - 1)/n · s bytes per
    rank, and an all-gather or reduce-scatter sends half of that. The formulas are from ZeRO (arXiv 1910.02054, section
    7), Megatron (arXiv 1909.08053) and Ulysses (arXiv 2309.14509).
    """
    layout, section = resolved.layout, resolved.recipe.model
    zero = ZeroSettings(resolved)
    ranks = [local_parameters(section, layout, stage) for stage in range(layout.pipeline_stages)]
    between_zero_ranks = between_tensor_ranks = 0
    if zero.optimizer.steps_on_whole_matrices:
        between_zero_ranks, between_tensor_ranks = max(muon.traffic(zero, rank) for rank in ranks)
    hidden = layout.micro_batch * section.seq_len // layout.sequence_parallel * section.d_model * zero.element
    blocks = -(-section.n_layer // layout.pipeline_stages)
    recomputed = layout.recomputed_blocks / section.n_layer
    # Number of all-reduces per block. The forward pass has one after attention and one after the MLP. The backward pass
    # has one for each of the projections qkv, up and gate.
    all_reduces = 2 * (1 + recomputed) + (3 if section.is_gated else 2)
    all_reduce = 2 * _ring(layout.tensor_parallel)
    kv_width = section.n_kv_head * (section.d_model // section.n_head)
    # The all-to-alls exchange queries, the output of attention, keys and values.
    exchanged = hidden * 2 * (1 + kv_width / section.d_model)
    all_to_all = _ring(layout.sequence_parallel) * exchanged
    return Traffic(
        data_parallel=int(_data_parallel(zero, max(rank.total for rank in ranks))) + between_zero_ranks,
        tensor_parallel=int(layout.accumulation * blocks * all_reduces * all_reduce * hidden) + between_tensor_ranks,
        pipeline=layout.accumulation * hidden * min(layout.pipeline_stages - 1, 2),
        sequence_parallel=int(layout.accumulation * blocks * (2 + recomputed) * all_to_all),
    )


def _data_parallel(zero: ZeroSettings, parameters: int) -> float:
    """Return the bytes of gradients and weights that a rank sends to ranks that hold the same part of the model."""
    low, reduced, fraction = zero.element * parameters, zero.reduced * parameters, _ring(zero.shards)
    stage, micro_batches = zero.layout.zero_stage, zero.layout.accumulation
    if stage == 0:
        return 2 * fraction * FP32_BYTES * parameters
    if stage == 1:
        return fraction * (2 * reduced + low)  # At stage 1, DeepSpeed all-reduces whole gradients.
    if stage == 2:
        return fraction * (reduced * micro_batches + low)
    return fraction * micro_batches * (2 * low + reduced)


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def disk(resolved: Resolved, tokens: int | None) -> Disk:
    """Return the disk space that a run needs.

    Args:
        resolved: the recipe, config and layout of the run.
        tokens: number of tokens of the run; None if it is not known.
    """
    recipe = resolved.recipe
    checkpoint = cost.checkpoint_bytes(recipe.model)
    facts = OPTIMIZERS[recipe.optimizer.type]
    states_saved = OPTIMIZERS["adamw"].matrix_states - facts.matrix_states
    checkpoint -= states_saved * FP32_BYTES * sum(map(muon.elements, layer_shapes(recipe.model)))
    kept = recipe.checkpoint.keep_last
    checkpoints = None
    if kept is not None and recipe.checkpoint.keep_every is None:
        checkpoints = (kept + 1) * checkpoint
    corpus = None if tokens is None else tokens * bytes_per_token(recipe.model.vocab_size)
    return Disk(checkpoint, checkpoints, corpus)


def format_duration(seconds: float) -> str:
    """Format a duration in days, hours, minutes or seconds."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {name}"
    return f"{math.ceil(seconds)} seconds"
