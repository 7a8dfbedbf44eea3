"""Shrink a recipe so that one process can train it in seconds, and generate synthetic samples for it."""

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
MICRO = 2  # number of samples per micro-batch
_EOD = 5  # end-of-document token, an ordinary token that some of the sequences contain


def shrinking_overrides(resolved: Resolved, updates: int, clip: float | None) -> tuple[str, ...]:
    """Return overrides that shrink a recipe, and the batch sizes of its DeepSpeed config, so that it trains in seconds.

    All switches, such as the norm and the ZeRO stage, stay the same. So do the ratio of query heads to key heads, the
    fraction of recomputed blocks, the way in which the layout splits the model, and the kinds of layer on each pipeline
    stage (see `shrunk_model`). Settings that would hide an error or magnify rounding errors are changed. Dropout is
    off, ZeRO-3 shards even small parameters, eps is large enough for weights whose gradient is only rounding, and only
    some updates are clipped.

    Args:
        resolved: The real recipe and its DeepSpeed config.
        updates: The number of updates of the small run.
        clip: The maximum gradient norm of the small run; None for no clipping.

    Returns:
        The overrides.
    """
    recipe, layout = resolved.recipe, resolved.layout
    small = shrunk_model(recipe.model, layout)
    recomputed = -(-layout.recomputed_blocks * small.n_layer // recipe.model.n_layer)
    accumulation = max(min(layout.accumulation, 3), layout.pipeline_stages)
    # Larger models have larger curvature, which magnifies rounding errors.
    rate = (3e-3 if small.n_layer == 2 else 1e-3) * _WIDTH / small.d_model
    floor = recipe.schedule.min_lr / recipe.optimizer.lr * rate
    shape = ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "vocab_size", "seq_len")
    values = {
        **{f"model.{name}": getattr(small, name) for name in shape},
        "model.dropout": 0.0, "batch.global_size": layout.data_parallel * accumulation * MICRO,
        "optimizer.lr": rate, "optimizer.eps": 1e-6, "optimizer.clip": clip, "schedule.min_lr": floor,
        **_length_overrides(resolved, updates), **_batch_overrides(MICRO),
    }  # fmt: skip
    if layout.zero_stage == 3:
        values["ds.zero_optimization.stage3_param_persistence_threshold"] = 0
    if recomputed:
        values["ds.activation_checkpointing.number_checkpoints"] = recomputed
    return _as_overrides(values)


def single_update_overrides(resolved: Resolved, micro_batches: int, updates: int) -> tuple[str, ...]:
    """Return overrides that keep the real model and layout, but reduce an update to a few micro-batches.

    Args:
        resolved: The real recipe and its DeepSpeed config.
        micro_batches: The number of micro-batches per rank and update.
        updates: The number of updates of the schedule.

    Returns:
        The overrides.
    """
    layout = resolved.layout
    return _as_overrides({
        "batch.global_size": layout.data_parallel * micro_batches * layout.micro_batch,
        **_length_overrides(resolved, updates), **_batch_overrides(layout.micro_batch),
    })  # fmt: skip


def shrunk_model(real: ModelSection, layout: Layout) -> ModelSection:
    """Return a small model that a layout splits in the same way as the real one.

    Each pipeline stage holds the same kinds of layer. The vocabulary size is divisible by the tensor-parallel degree if
    and only if that of the real model is, because otherwise every rank holds the whole vocabulary. Heads, d_ff and the
    sequence are always divisible, as in every valid layout. If no small model is split in the same way, the smallest
    one is returned, so callers must compare `flops.stage_kinds`.

    Args:
        real: The shape of the real model.
        layout: The layout.

    Returns:
        The shape of the small model.
    """
    smallest, *others = _candidates(real, layout)
    kinds = flops.stage_kinds(real, layout.pipeline_stages)
    alike = (one for one in (smallest, *others) if flops.stage_kinds(one, layout.pipeline_stages) == kinds)
    return next(alike, smallest)


def _candidates(real: ModelSection, layout: Layout) -> Iterator[ModelSection]:
    """Yield small models: first one with two blocks per stage and a small vocabulary, then all others, cheapest first.

    The others have different numbers of blocks and vocabulary sizes. With few blocks and a large vocabulary, the head
    gets a separate stage.
    """
    stages, degree = layout.pipeline_stages, layout.tensor_parallel
    small = _narrow_model(real, layout)

    def of(blocks: int, vocab_size: int) -> ModelSection:
        while (vocab_size % degree == 0) != (real.vocab_size % degree == 0):
            vocab_size += 1
        return small.model_copy(update={"n_layer": blocks, "vocab_size": vocab_size})

    yield of(2 * stages, _VOCAB_SIZES[0])
    if stages > 1:
        blocks = range(stages, max(2 * stages, real.n_layer) + 1)
        every = [of(number, size) for number in blocks for size in _VOCAB_SIZES]
        yield from sorted(every, key=flops.flops_per_token)


def _narrow_model(real: ModelSection, layout: Layout) -> ModelSection:
    """Return the real model with few and narrow heads, an MLP in the same proportion, and short sequences."""
    degree = layout.tensor_parallel * layout.sequence_parallel
    group = real.n_head // real.n_kv_head
    kv_heads = degree * -(-4 // (degree * group))
    head_dim = max(4, _WIDTH // (kv_heads * group) // 2 * 2)  # Rotary positions require an even number.
    width = kv_heads * group * head_dim
    d_ff = max(1, round(real.d_ff / real.d_model * width / (8 * degree))) * 8 * degree
    return real.model_copy(update={
        "n_head": kv_heads * group, "n_kv_head": kv_heads, "d_model": width, "d_ff": d_ff,
        "seq_len": _SEQ_LEN * layout.sequence_parallel,
    })  # fmt: skip


def _length_overrides(resolved: Resolved, updates: int) -> dict[str, object]:
    """Return overrides for the length and the schedule, and for the end-of-document token if documents are masked."""
    recipe = resolved.recipe
    return {
        "schedule.warmup_updates": updates // 4,
        "schedule.decay_updates": updates // 4 if recipe.schedule.type == "wsd" else None,
        "length.updates": updates, "length.tokens": None, "length.epochs": None,
        **({"data.eod": _EOD} if recipe.data.document_mask else {}),
    }  # fmt: skip


def _batch_overrides(micro_batch: int) -> dict[str, object]:
    return {
        "ds.train_micro_batch_size_per_gpu": micro_batch, "ds.gradient_accumulation_steps": "auto",
        "ds.train_batch_size": "auto",
    }  # fmt: skip


def _as_overrides(values: dict[str, object]) -> tuple[str, ...]:
    return tuple(f"{key}={'null' if value is None else value}" for key, value in values.items())


def synthetic_samples(section: ModelSection, number: int, first: int) -> Batch:
    """Generate samples from which a model can learn something.

    Each sequence counts upwards in steps of a random size, with one token in eight replaced at random. A random number
    of labels at the end of each sequence are ignored, so that ranks and micro-batches have different numbers of valid
    labels.

    Args:
        section: The shape of the model, which defines the vocabulary and the sequence length.
        number: The number of samples.
        first: The data position of the first sample. A sample depends only on its data position.

    Returns:
        Token ids and labels, each [number, seq].
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
