"""All layouts of the parity tests, each with its DeepSpeed config, and the tiny run that all of them train.

A case consists of a name, a number of ranks, the DeepSpeed config as a user would write it, and recipe overrides.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megagpt.cluster import Rank
from megagpt.config import deepspeed as ds_config
from megagpt.config import recipe as recipes
from megagpt.config.deepspeed import Layout, Resolved
from megagpt.config.recipe import Recipe
from megagpt.data.loader import Batch
from megagpt.engine.deepspeed_keys import known_keys

GLOBAL_BATCH = 12  # divisible by 1, 2, 3 and 4 ranks
HELD_OUT = 12
HELD_OUT_FROM = 1_000_000  # a data position far from those that are trained on
LLAMA = (
    "model.position=rope",
    "model.norm=rmsnorm",
    "model.activation=swiglu",
    "model.n_kv_head=2",
    "model.tie_embeddings=false",
)
SWITCHES = (*LLAMA, "model.n_layer=3", "model.qk_norm=true", "model.logit_softcap=5.0", "model.init=zero_projections")
DOCUMENTS = ("data.document_mask=true", "data.eod=5")  # half of the sequences contain token 5, some of them twice
BF16, FP16 = ("precision=bf16",), ("precision=fp16",)
# Three blocks: with two blocks on two ranks, the partition boundary would be between two matrices.
MUON = ("optimizer.type=muon", "optimizer.muon_lr=5.0e-3", "optimizer.clip=1.5", "model.n_layer=3")

# eps: with 1e-8, weights whose gradient is only rounding (the bias of keys, rows of rare tokens) would move by the full
# learning rate in a random direction. The gradient norm in fp32 then differs from fp64 by 8e-6; with eps 1e-6, by less
# than 1e-6.
RECIPE = """
run_dir: unused
seed: 7
precision: fp32
model: {n_layer: 2, n_head: 4, d_model: 64, vocab_size: 128, seq_len: 32}
data: {train: unused}
batch: {global_size: 12}
optimizer: {type: adamw, lr: 3.0e-3, eps: 1.0e-6, clip: 1.15}
schedule: {type: warmup_decay, warmup_updates: 4}
length: {updates: 100}
"""


@dataclass(frozen=True)
class Case:
    """A layout: its name, number of ranks, DeepSpeed config, and recipe overrides as on the command line."""

    id: str
    world: int
    config: dict[str, Any] = field(default_factory=dict)
    recipe: tuple[str, ...] = ()


def zero(stage: int, micro: int | None = None, **more: Any) -> dict[str, Any]:
    """Return a config with a ZeRO stage that shards even the smallest parameters."""
    section: dict[str, Any] = {"stage": stage, **more}
    if stage == 3:
        section |= {"stage3_param_persistence_threshold": 0}
    batch = {} if micro is None else {"train_micro_batch_size_per_gpu": micro}
    return {"zero_optimization": section, **batch}


def _again(blocks: int | str, **more: Any) -> dict[str, Any]:
    """Return the config section that recomputes some blocks."""
    return {"activation_checkpointing": {"number_checkpoints": blocks, **more}}


def _pipeline(stages: int, micro: int, **more: Any) -> dict[str, Any]:
    return {"pipeline": {"stages": stages}, **zero(1, micro, **more)}


def _tensor(degree: int, config: dict[str, Any]) -> dict[str, Any]:
    return {"tensor_parallel": {"autotp_size": degree}, **config}


def _ulysses(degree: int, config: dict[str, Any]) -> dict[str, Any]:
    return {"sequence_parallel_size": degree, **config}


def _shape(blocks: int, vocabulary: int, width: int = 64) -> tuple[str, ...]:
    """Return overrides for the sizes that determine how layers are assigned to stages.

    With a large vocabulary, the head is expensive.
    """
    return (f"model.n_layer={blocks}", f"model.vocab_size={vocabulary}", f"model.d_model={width}")


# Deeper models have larger curvature, which magnifies rounding errors. A lower learning rate keeps them small.
DEEP = ("model.n_layer=4", "optimizer.lr=1.0e-3")
FOUR = (*DEEP, "optimizer.clip=1.5")
CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "NVME"}  # NVME is replaced by a folder
ROPE, LEARNED, OUT = ("model.position=rope",), "model.position=learned", {"offload_optimizer": CPU}
UNTIED, TIED = "model.tie_embeddings=false", "model.tie_embeddings=true"
# Without qk-norm, queries and keys have small gradients, and Muon's rounding errors are larger with a large vocabulary.
SURE = (*MUON, *LLAMA, "model.qk_norm=true", "optimizer.clip=1.0")
OFFLOADED = {"offload_optimizer": CPU, "offload_param": CPU}
CASES: tuple[Case, ...] = (
    *(Case(f"zero{stage}-1rank", 1, zero(stage)) for stage in range(4)),
    *(Case(f"zero{stage}-2ranks", 2, zero(stage)) for stage in range(4)),
    *(Case(f"zero{stage}-accumulate4-3ranks", 3, zero(stage, 1)) for stage in range(4)),
    *(Case(f"zero{stage}-4ranks", 4, zero(stage)) for stage in range(4)),
    *(Case(f"zero{stage}-llama-2ranks", 2, zero(stage, 3), LLAMA) for stage in range(4)),
    Case("zero3-persistent-2ranks", 2, {"zero_optimization": {"stage": 3}}),
    Case("zero3-tied-rope-2ranks", 2, zero(3, 2), (*LLAMA, "model.tie_embeddings=true", "optimizer.clip=0.95")),
    Case("zero2-untied-learned-2ranks", 2, zero(2, 2), ("model.tie_embeddings=false",)),
    Case("zero3-every-switch-4ranks", 4, zero(3, 1), SWITCHES),
    Case("zero1-every-switch-accumulate4-3ranks", 3, zero(1, 1), SWITCHES),
    Case("zero1-no-clip-2ranks", 2, zero(1), ("optimizer.clip=null",)),
    *(Case(f"zero{stage}-offload-2ranks", 2, zero(stage, 3, offload_optimizer=CPU)) for stage in (1, 2, 3)),
    Case("zero1-offload-1rank", 1, zero(1, 3, offload_optimizer=CPU)),
    Case("zero3-offload-parameters-1rank", 1, zero(3, 3, **OFFLOADED)),
    Case("zero3-offload-parameters-4ranks", 4, zero(3, 1, **OFFLOADED), LLAMA),
    Case("zero3-nvme-2ranks", 2, zero(3, 3, offload_optimizer=NVME, offload_param=NVME)),
    Case("zero3-hpz2-4ranks", 4, zero(3, zero_hpz_partition_size=2)),
    *(Case(f"zero{stage}-recompute-all-2ranks", 2, zero(stage, 3) | _again("auto")) for stage in (0, 2, 3)),
    Case("zero1-recompute-1of2-1rank", 1, zero(1, 6) | _again(1)),
    Case("zero3-recompute-host-2ranks", 2, zero(3, 3) | _again(2, cpu_checkpointing=True), LLAMA),
    Case("zero3-offload-recompute-2ranks", 2, zero(3, 2, **OFFLOADED) | _again("auto")),
    *(Case(f"zero{stage}-bf16-2ranks", 2, zero(stage, 3), BF16) for stage in range(4)),
    *(Case(f"zero{stage}-fp16-2ranks", 2, zero(stage, 3), FP16) for stage in range(4)),
    *(Case(f"zero0-muon-{n}ranks", n, zero(0, 3), MUON) for n in (1, 2, 4)),
    Case("zero0-muon-llama-recompute-2ranks", 2, zero(0, 6) | _again("auto"), (*MUON, *LLAMA, "optimizer.clip=1.0")),
    Case("ulysses2-zero0-muon", 2, _ulysses(2, zero(0)), MUON),
    Case("zero1-muon-2ranks", 2, zero(1), MUON),
    Case("zero2-muon-accumulate3-4ranks", 4, zero(2, 1), MUON),
    Case("zero1-muon-llama-4ranks", 4, zero(1), (*MUON, *LLAMA, "optimizer.clip=1.0")),
    Case("zero2-muon-offload-2ranks", 2, zero(2, 3, offload_optimizer=CPU), MUON),
    Case("zero3-muon-llama-4ranks", 4, zero(3, 1, sub_group_size=20_000), (*MUON, *LLAMA, "optimizer.clip=1.0")),
    Case("zero3-muon-offload-parameters-2ranks", 2, zero(3, 3, **OFFLOADED), MUON),
    Case("zero3-muon-nvme-2ranks", 2, zero(3, 3, offload_optimizer=NVME, offload_param=NVME), MUON),
    Case("zero1-muon-bf16-2ranks", 2, zero(1, 3), (*MUON, *BF16)),
    Case("zero2-muon-bf16-2ranks", 2, zero(2, 3), (*MUON, *BF16)),
    Case("zero3-muon-bf16-2ranks", 2, zero(3, 3), (*MUON, *BF16)),
    Case("zero2-muon-fp16-2ranks", 2, zero(2, 3), (*MUON, *FP16)),
    Case("pipeline2-data2-muon", 4, _pipeline(2, 2), (*FOUR, *MUON)),
    Case("pipeline2-muon-bf16", 2, _pipeline(2, 2), (*FOUR, *MUON, *BF16)),
    Case("pipeline2-tensor2-muon", 4, _tensor(2, _pipeline(2, 2)), (*FOUR, *MUON)),
    Case("tensor2-zero2-muon-llama-data2", 4, _tensor(2, zero(2, 2)), (*MUON, *LLAMA, "optimizer.clip=1.0")),
    Case("tensor2-zero3-muon", 2, _tensor(2, zero(3)), MUON),
    Case("ulysses2-zero2-muon", 2, _ulysses(2, zero(2)), MUON),
    Case("zero1-bf16-1rank", 1, zero(1), BF16),
    Case("zero2-bf16-offload-2ranks", 2, zero(2, 2, offload_optimizer=CPU), BF16),
    Case("zero3-bf16-llama-recompute-2ranks", 2, zero(3, 2) | _again("auto"), (*BF16, *LLAMA)),
    *(Case(f"pipeline{stages}", stages, _pipeline(stages, 2), FOUR) for stages in (2, 3, 4)),
    Case("pipeline2-1micro", 2, _pipeline(2, 12), FOUR),
    Case("pipeline2-untied", 2, _pipeline(2, 3), (*FOUR, "model.tie_embeddings=false")),
    Case("pipeline4-llama", 4, _pipeline(4, 2), (*DEEP, *LLAMA)),
    Case("pipeline2-data2", 4, _pipeline(2, 2), FOUR),
    Case("pipeline2-data2-llama", 4, _pipeline(2, 1), (*DEEP, *LLAMA)),
    Case("pipeline2-recompute-all", 2, _pipeline(2, 2) | _again("auto"), FOUR),
    Case("pipeline2-data2-recompute-2of4-host", 4, _pipeline(2, 2) | _again(2, cpu_checkpointing=True), FOUR),
    Case("pipeline2-offload", 2, _pipeline(2, 2, offload_optimizer=CPU), FOUR),
    Case("pipeline2-tensor2-recompute-3of4", 4, {**_tensor(2, _pipeline(2, 2)), **_again(3)}, FOUR),
    Case("pipeline2-bf16", 2, _pipeline(2, 2), (*FOUR, "precision=bf16")),
    Case("pipeline2-fp16-untied", 2, _pipeline(2, 2), (*FOUR, "precision=fp16", "model.tie_embeddings=false")),
    Case("pipeline2-data2-bf16-untied", 4, _pipeline(2, 2), (*FOUR, "precision=bf16", "model.tie_embeddings=false")),
    *(Case(f"tensor2-zero{stage}", 2, _tensor(2, zero(stage))) for stage in (0, 1, 2)),
    *(Case(f"tensor2-zero{stage}-llama-data2", 4, _tensor(2, zero(stage, 2)), LLAMA) for stage in (1, 2)),
    Case("tensor4", 4, _tensor(4, zero(1, 3))),
    Case("tensor2-odd-vocabulary", 2, _tensor(2, zero(1)), ("model.vocab_size=129",)),
    Case("tensor2-every-switch", 2, _tensor(2, zero(2, 3)), SWITCHES),
    Case("tensor2-untied", 2, _tensor(2, zero(1)), ("model.tie_embeddings=false",)),
    Case("tensor2-bf16", 2, _tensor(2, zero(1)), ("precision=bf16",)),
    Case("tensor2-fp16", 2, _tensor(2, zero(1)), ("precision=fp16",)),
    Case("tensor2-bf16-zero2-data2", 4, _tensor(2, zero(2, 3)), ("precision=bf16",)),
    Case("tensor2-offload-recompute", 2, _tensor(2, zero(1, 3, offload_optimizer=CPU) | _again("auto"))),
    Case("pipeline2-tensor2", 4, _tensor(2, _pipeline(2, 2)), FOUR),
    Case("pipeline2-tensor2-llama", 4, _tensor(2, _pipeline(2, 3)), (*DEEP, *LLAMA)),
    Case("pipeline2-tensor2-fp16-llama", 4, _tensor(2, _pipeline(2, 2)), (*DEEP, *LLAMA, "precision=fp16")),
    Case("ulysses2-fp16", 2, _ulysses(2, zero(2)), ("precision=fp16",)),
    Case("pipeline2-tensor2-bf16", 4, _tensor(2, _pipeline(2, 2)), (*FOUR, "precision=bf16")),
    *(Case(f"ulysses2-zero{stage}", 2, _ulysses(2, zero(stage, 6))) for stage in range(4)),
    *(Case(f"ulysses2-zero{stage}-llama-data2", 4, _ulysses(2, zero(stage, 3)), LLAMA) for stage in (1, 2, 3)),
    Case("ulysses4-zero3", 4, _ulysses(4, zero(3))),
    Case("ulysses2-zero1-bf16", 2, _ulysses(2, zero(1)), ("precision=bf16",)),
    Case("ulysses2-zero3-bf16", 2, _ulysses(2, zero(3)), ("precision=bf16",)),
    Case("ulysses2-zero3-offload-recompute", 2, _ulysses(2, zero(3, 4, **OFFLOADED) | _again("auto")), LLAMA),
    Case("ulysses2-tensor2", 4, _ulysses(2, _tensor(2, zero(1)))),
    Case("ulysses2-pipeline2-llama", 4, _ulysses(2, _pipeline(2, 3)), (*DEEP, *LLAMA)),
    Case("zero3-documents-llama-recompute-2ranks", 2, zero(3, 3) | _again("auto"), (*LLAMA, *DOCUMENTS)),
    Case("pipeline3-documents", 3, _pipeline(3, 2), (*FOUR, *DOCUMENTS)),
    Case("pipeline4-documents-llama-recompute", 4, _pipeline(4, 2) | _again("auto"), (*DEEP, *LLAMA, *DOCUMENTS)),
    Case("zero2-documents-bf16-2ranks", 2, zero(2, 3), (*BF16, *DOCUMENTS)),
    Case("tensor2-documents", 2, _tensor(2, zero(1)), DOCUMENTS),
    Case("ulysses2-documents", 2, _ulysses(2, zero(2, 3)), DOCUMENTS),
    Case("ulysses2-pipeline2-documents-llama", 4, _ulysses(2, _pipeline(2, 3)), (*DEEP, *LLAMA, *DOCUMENTS)),
    Case("tensor2-zero3", 2, _tensor(2, zero(3))),
    Case("tensor2-zero2-offload", 2, _tensor(2, zero(2, offload_optimizer=CPU))),
    Case("ulysses2-zero3-offload", 2, _ulysses(2, zero(3, **OFFLOADED))),
    Case("tensor2-zero3-data2-llama", 4, _tensor(2, zero(3)), LLAMA),
    Case("pipeline2-data2-offload", 4, _pipeline(2, 2, offload_optimizer=CPU), FOUR),
    # named by the layers of each stage: E embedding, P positions, B block, N norm, H head
    Case("stages-EPBBN-H", 2, _pipeline(2, 2), _shape(2, 4096)),
    Case("stages-EPBBN-H-muon-offload-bf16", 2, _pipeline(2, 2, **OUT), (*MUON, *_shape(2, 4096), *BF16)),
    Case("stages-EBB-NH-muon-untied-bf16", 2, _pipeline(2, 2), (*MUON, *_shape(2, 1024), *ROPE, UNTIED, *BF16)),
    Case("stages-EPBB-NH-data2-fp16", 4, _pipeline(2, 2), (*_shape(2, 2048), *FP16)),
    Case("stages-EPB-B-BNH-offload", 3, _pipeline(3, 2, **OUT), (*_shape(3, 128), *DEEP[1:], "optimizer.clip=1.5")),
    Case("stages-EPB-BB-NH-muon-offload", 3, _pipeline(3, 2, **OUT), (*SURE, *_shape(3, 1024), LEARNED, TIED)),
    Case(
        "stages-EB-BBN-H-muon-offload-fp16",
        3,
        _pipeline(3, 2, **OUT),
        (*SURE, *_shape(3, 2048), TIED, *FP16, "optimizer.clip=1.5"),
    ),
    Case("stages-E-BBBN-H-recompute-bf16", 3, _pipeline(3, 2) | _again(2), (*_shape(3, 8192, 32), *ROPE, *BF16)),
    Case(
        "stages-EP-BBB-BBN-H-muon-untied", 4, _pipeline(4, 3) | _again("auto"), (*SURE, *_shape(5, 8192, 32), LEARNED)
    ),
    Case("stages-E-PBB-BBN-H-offload", 4, _pipeline(4, 3, **OUT), _shape(4, 8192, 32)),
    Case("stages-EB-BB-BB-NH-muon-untied-bf16", 4, _pipeline(4, 3), (*MUON, *_shape(5, 1024), *ROPE, UNTIED, *BF16)),
)


def recipe_of(case: Case, folder: Path) -> Recipe:
    """Load the recipe of a case from a file that is written into `folder`."""
    path = folder / f"recipe-{os.getpid()}.yaml"
    path.write_text(RECIPE)
    return recipes.load(path, case.recipe)


def resolve(case: Case, folder: Path) -> Resolved:
    """Resolve the recipe and the DeepSpeed config of a case, from files that are written into `folder`."""
    path = folder / f"{case.id}-{os.getpid()}.json"
    path.write_text(json.dumps(case.config).replace("NVME", str(folder / "nvme")))
    return ds_config.load(path, recipe_of(case, folder), case.world, _known())


@lru_cache(maxsize=1)
def _known() -> dict[str, Any]:
    return known_keys()


def samples(recipe: Recipe, number: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate samples from which a model can learn something.

    Each sequence counts upwards in steps of a random size, with one token in eight replaced at random. Labels at its
    end are ignored, a random number of them.

    Args:
        recipe: The recipe.
        number: The number of samples.
        first: The data position of the first one, which determines it.

    Returns:
        input_ids and labels [number, seq].
    """
    size, length = recipe.model.vocab_size, recipe.model.seq_len
    rows, masks = [], []
    for position in range(first, first + number):
        generator = torch.Generator().manual_seed(position)
        start, step, tail = (int(torch.randint(low, high, (), generator=generator)) for low, high in _RANGES)
        row = (start + step * torch.arange(length + 1)) % size
        noise = torch.rand(length + 1, generator=generator) < 0.125
        rows.append(torch.where(noise, torch.randint(size, (length + 1,), generator=generator), row))
        masks.append(torch.arange(length) >= length - tail)
    ids = torch.stack(rows)
    return ids[:, :-1].contiguous(), ids[:, 1:].masked_fill(torch.stack(masks), -100)


def share(samples: tuple[torch.Tensor, torch.Tensor], layout: Layout, rank: Rank) -> list[Batch]:
    """Return this rank's micro-batches: sample k of micro-batch j on data rank r is j·micro·ranks + r·micro + k."""
    micro, ranks = layout.micro_batch, layout.data_parallel
    starts = range(layout.data_rank(rank.rank) * micro, len(samples[0]), micro * ranks)
    return [Batch(*(tensor[start : start + micro] for tensor in samples)) for start in starts]


_RANGES = ((0, 128), (1, 4), (0, 24))
