"""A run small enough to be repeated by one process, with every switch of the real one; and its samples."""

from __future__ import annotations

import torch

from megagpt.data.loader import Batch
from megagpt.ds_config import Resolved
from megagpt.recipe import ModelSection
from megagpt.state import IGNORE_INDEX

_WIDTH, _VOCAB_SIZE, _SEQ_LEN = 64, 128, 32
MICRO = 2  # samples of a micro-batch
_EOD = 5  # one token of many: some sequences hold it, others do not


def words(resolved: Resolved, updates: int, clip: float | None) -> tuple[str, ...]:
    """Overrides that shrink a recipe, and the batch sizes of its DeepSpeed config, to seconds.

    Kept are all switches, the ratio of query to key heads, what is recomputed, and how the layout cuts everything.
    Changed is what would hide a fault or enlarge rounding: dropout is off, ZeRO-3 keeps no small parameter whole,
    eps is large enough for weights whose gradient is rounding alone, and clipping acts in some updates only.
    """
    recipe, layout, model = resolved.recipe, resolved.layout, resolved.recipe.model
    cut = layout.tensor_parallel * layout.sequence_parallel
    group = model.n_head // model.n_kv_head
    kv_heads = cut * -(-4 // (cut * group))
    head_dim = max(4, _WIDTH // (kv_heads * group) // 2 * 2)  # even, for rotary positions
    width = kv_heads * group * head_dim
    d_ff = max(1, round(model.d_ff / model.d_model * width / (8 * cut))) * 8 * cut
    blocks = 2 * layout.pipeline_stages
    again = -(-layout.recomputed_blocks * blocks // model.n_layer)
    accumulation = max(min(layout.accumulation, 3), layout.pipeline_stages)
    rate = (3e-3 if blocks == 2 else 1e-3) * _WIDTH / width  # larger models meet steeper slopes: rounding grows
    floor = recipe.schedule.min_lr / recipe.optimizer.lr * rate
    values = {
        "model.n_layer": blocks, "model.n_head": kv_heads * group, "model.n_kv_head": kv_heads, "model.d_model": width,
        "model.d_ff": d_ff, "model.vocab_size": _VOCAB_SIZE, "model.seq_len": _SEQ_LEN * layout.sequence_parallel,
        "model.dropout": 0.0, "batch.global_size": layout.data_parallel * accumulation * MICRO,
        "optimizer.lr": rate, "optimizer.eps": 1e-6, "optimizer.clip": clip,
        "schedule.warmup_updates": updates // 4, "schedule.min_lr": floor,
        "schedule.decay_updates": updates // 4 if recipe.schedule.type == "wsd" else None,
        "length.updates": updates, "length.tokens": None, "length.epochs": None,
        "ds.train_micro_batch_size_per_gpu": MICRO, "ds.gradient_accumulation_steps": "auto",
        "ds.train_batch_size": "auto",
    }  # fmt: skip
    if recipe.data.document_mask:
        values["data.eod"] = _EOD
    if layout.zero_stage == 3:
        values["ds.zero_optimization.stage3_param_persistence_threshold"] = 0
    if again:
        values["ds.activation_checkpointing.number_checkpoints"] = again
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
