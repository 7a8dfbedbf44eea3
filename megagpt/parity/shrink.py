"""A run small enough to be repeated by one process, with every switch of the real one, and its samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megagpt.config.deepspeed import Layout, Resolved
from megagpt.config.recipe import ModelSection
from megagpt.data.loader import Batch
from megagpt.model import flops
from megagpt.state import IGNORE_INDEX

_WIDTH, _SEQ_LEN = 64, 32
_VOCAB_SIZES = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576)
MICRO = 2  # samples of a micro-batch
_EOD = 5  # one token of many: some sequences hold it, others do not


def overrides(resolved: Resolved, updates: int, clip: float | None) -> tuple[str, ...]:
    """Return overrides that shrink a recipe, and the batch sizes of its DeepSpeed config, to seconds.

    Kept are all switches, the ratio of query heads to key heads, the fraction of recomputed blocks, how the layout
    cuts everything, and the kinds of layer on each pipeline stage (`model`). Changed is what would hide a fault or
    enlarge rounding: dropout is off, ZeRO-3 keeps no small parameter whole, eps is large enough for weights whose
    gradient is rounding alone, and clipping acts in some updates only.

    Args:
        resolved: The real recipe and its DeepSpeed config.
        updates: The number of updates of the small run.
        clip: The largest gradient norm of the small run; None for no clipping.
    """
    recipe, layout = resolved.recipe, resolved.layout
    small = model(recipe.model, layout)
    recomputed = -(-layout.recomputed_blocks * small.n_layer // recipe.model.n_layer)
    accumulation = max(min(layout.accumulation, 3), layout.pipeline_stages)
    # larger models have steeper slopes, and rounding grows with them
    rate = (3e-3 if small.n_layer == 2 else 1e-3) * _WIDTH / small.d_model
    floor = recipe.schedule.min_lr / recipe.optimizer.lr * rate
    shape = ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "vocab_size", "seq_len")
    values = {
        **{f"model.{name}": getattr(small, name) for name in shape},
        "model.dropout": 0.0, "batch.global_size": layout.data_parallel * accumulation * MICRO,
        "optimizer.lr": rate, "optimizer.eps": 1e-6, "optimizer.clip": clip, "schedule.min_lr": floor,
        **_length(resolved, updates), **_batch(MICRO),
    }  # fmt: skip
    if layout.zero_stage == 3:
        values["ds.zero_optimization.stage3_param_persistence_threshold"] = 0
    if recomputed:
        values["ds.activation_checkpointing.number_checkpoints"] = recomputed
    return _written(values)


def one_update(resolved: Resolved, micro_batches: int, updates: int) -> tuple[str, ...]:
    """Return overrides that keep the real model and layout, and shorten an update to a few micro-batches.

    Args:
        resolved: The real recipe and its DeepSpeed config.
        micro_batches: The number of micro-batches per rank.
        updates: The number of updates of the schedule.
    """
    layout = resolved.layout
    return _written({
        "batch.global_size": layout.data_parallel * micro_batches * layout.micro_batch,
        **_length(resolved, updates), **_batch(layout.micro_batch),
    })  # fmt: skip


def model(real: ModelSection, layout: Layout) -> ModelSection:
    """Return a small model that a layout cuts in the same way as the real one.

    Each pipeline stage holds the same kinds of layer, and the vocabulary divides by the tensor-parallel degree if
    and only if the real one does: a vocabulary that does not divide is kept whole on every rank. Heads, d_ff and the
    sequence always divide, as they do in every layout that is accepted. If no small model is cut alike, the smallest
    one is returned; callers compare `cost.stage_kinds`.
    """
    smallest, *others = _candidates(real, layout)
    kinds = flops.stage_kinds(real, layout.pipeline_stages)
    alike = (one for one in (smallest, *others) if flops.stage_kinds(one, layout.pipeline_stages) == kinds)
    return next(alike, smallest)


def _candidates(real: ModelSection, layout: Layout) -> Iterator[ModelSection]:
    """Two blocks per stage and a small vocabulary first, then every other number and size, the cheapest first.

    Few blocks and a large vocabulary put the head on a stage of its own.
    """
    stages, degree = layout.pipeline_stages, layout.tensor_parallel
    small = _narrow(real, layout)

    def of(blocks: int, vocab_size: int) -> ModelSection:
        while (vocab_size % degree == 0) != (real.vocab_size % degree == 0):
            vocab_size += 1
        return small.model_copy(update={"n_layer": blocks, "vocab_size": vocab_size})

    yield of(2 * stages, _VOCAB_SIZES[0])
    if stages > 1:
        blocks = range(stages, max(2 * stages, real.n_layer) + 1)
        every = [of(number, size) for number in blocks for size in _VOCAB_SIZES]
        yield from sorted(every, key=flops.flops_per_token)


def _narrow(real: ModelSection, layout: Layout) -> ModelSection:
    """The real model with few and narrow heads, a feed-forward part in proportion, and short sequences."""
    degree = layout.tensor_parallel * layout.sequence_parallel
    group = real.n_head // real.n_kv_head
    kv_heads = degree * -(-4 // (degree * group))
    head_dim = max(4, _WIDTH // (kv_heads * group) // 2 * 2)  # even, for rotary positions
    width = kv_heads * group * head_dim
    d_ff = max(1, round(real.d_ff / real.d_model * width / (8 * degree))) * 8 * degree
    return real.model_copy(update={
        "n_head": kv_heads * group, "n_kv_head": kv_heads, "d_model": width, "d_ff": d_ff,
        "seq_len": _SEQ_LEN * layout.sequence_parallel,
    })  # fmt: skip


def _length(resolved: Resolved, updates: int) -> dict[str, object]:
    """The schedule over so many updates, and the token that ends a document if attention keeps within documents."""
    recipe = resolved.recipe
    return {
        "schedule.warmup_updates": updates // 4,
        "schedule.decay_updates": updates // 4 if recipe.schedule.type == "wsd" else None,
        "length.updates": updates, "length.tokens": None, "length.epochs": None,
        **({"data.eod": _EOD} if recipe.data.document_mask else {}),
    }  # fmt: skip


def _batch(micro_batch: int) -> dict[str, object]:
    return {
        "ds.train_micro_batch_size_per_gpu": micro_batch, "ds.gradient_accumulation_steps": "auto",
        "ds.train_batch_size": "auto",
    }  # fmt: skip


def _written(values: dict[str, object]) -> tuple[str, ...]:
    return tuple(f"{key}={'null' if value is None else value}" for key, value in values.items())


def samples(section: ModelSection, number: int, first: int) -> Batch:
    """Token ids and labels [number, seq] of the data positions from `first` on; there is something to learn.

    Each sequence counts upwards in steps of its own, with one token in eight replaced by chance, and ignores the
    labels of a tail of its own length, so that ranks and micro-batches have unequally many.
    """
    size, length = section.vocab_size, section.seq_len
    rows, tails = [], []
    for position in range(first, first + number):
        generator = torch.Generator().manual_seed(position)
        start, step = (int(torch.randint(high, (), generator=generator)) for high in (size, 3))
        row = (start + (1 + step) * torch.arange(length + 1)) % size
        noise = torch.rand(length + 1, generator=generator) < 0.125
        rows.append(torch.where(noise, torch.randint(size, (length + 1,), generator=generator), row))
        tails.append(torch.arange(length) >= length - int(torch.randint(3 * length // 4, (), generator=generator)))
    ids = torch.stack(rows)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].masked_fill(torch.stack(tails), IGNORE_INDEX))
