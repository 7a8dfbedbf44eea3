"""Unsupported and impossible layouts: each row has the config lines and the complete error message."""

from __future__ import annotations

import json

import pytest

from megagpt.config.deepspeed import unsupported
from megagpt.errors import UserError

COMBINATIONS = {
    "both low precisions": (
        ['"bf16": {"enabled": true}', '"fp16": {"enabled": true}'],
        "megagpt: bf16 and fp16 are both enabled\n  bf16.enabled  true   d.json:2\n"
        "  fp16.enabled  true   d.json:3\n"
        '  do: keep one of the two, or write "auto" in both and state precision in the recipe',
    ),
    "offload_param below stage 3": (
        ['"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}'],
        "megagpt: offload_param is ignored below ZeRO stage 3, where parameters are not partitioned\n"
        "  zero_optimization.stage                 2       d.json:2\n"
        '  zero_optimization.offload_param.device  "cpu"   d.json:2\n'
        "  do: set zero_optimization.stage to 3, or remove offload_param",
    ),
    "offload_optimizer at stage 0": (
        ['"zero_optimization": {"offload_optimizer": {"device": "cpu"}}'],
        "megagpt: offload_optimizer is ignored at ZeRO stage 0, where nothing is partitioned\n"
        '  zero_optimization.offload_optimizer.device  "cpu"   d.json:2\n'
        "  zero_optimization.stage                     0       default\n"
        "  do: set zero_optimization.stage to 1, 2 or 3, or remove offload_optimizer",
    ),
    "optimizer to NVMe below stage 3": (
        ['"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}'],
        "megagpt: offload to NVMe needs ZeRO stage 3\n"
        "  zero_optimization.stage                     2        d.json:2\n"
        '  zero_optimization.offload_optimizer.device  "nvme"   d.json:2\n'
        "  do: set zero_optimization.stage to 3, or the device to cpu",
    ),
    "NVMe without a path": (
        ['"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}'],
        "megagpt: zero_optimization.offload_param to NVMe needs a path\n"
        "  d.json:2  zero_optimization.offload_param.device\n"
        "  do: give zero_optimization.offload_param.nvme_path: a directory on the local disk of every node",
    ),
    "ZeRO++ below stage 3": (
        ['"zero_optimization": {"stage": 2, "zero_quantized_gradients": true}'],
        "megagpt: ZeRO++ is ignored below ZeRO stage 3\n"
        "  zero_optimization.stage                     2      d.json:2\n"
        "  zero_optimization.zero_quantized_gradients  true   d.json:2\n"
        "  do: set zero_optimization.stage to 3, or remove the ZeRO++ keys",
    ),
    "ZeRO++ with offload": (
        ['"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2,\n"offload_optimizer": {"device": "cpu"}}'],
        "megagpt: ZeRO++ with offload does not train: the loss stays constant (DeepSpeed #6926)\n"
        "  zero_optimization.zero_hpz_partition_size   2       d.json:2\n"
        '  zero_optimization.offload_optimizer.device  "cpu"   d.json:3\n  do: keep one of the two',
    ),
    "an odd bucket below stage 3": (
        ['"zero_optimization": {"stage": 1, "allgather_bucket_size": 7}'],
        "megagpt: zero_optimization.allgather_bucket_size is odd: below ZeRO stage 3 DeepSpeed aligns what it gathers "
        "to 2 elements\n  d.json:2  zero_optimization.allgather_bucket_size\n  do: set it to 8",
    ),
    "gradients divided before they are scattered": (
        ['"prescale_gradients": true', '"zero_optimization": {"stage": 2}'],
        "megagpt: prescale_gradients is not supported by DeepSpeed at ZeRO stage 2, which scatters what it reduces\n"
        "  zero_optimization.stage  2      d.json:3\n  prescale_gradients       true   d.json:2\n"
        "  do: remove prescale_gradients, or set zero_optimization.reduce_scatter to false",
    ),
    "half a node": (
        ['"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}'],
        "megagpt: the 2 ranks cannot be divided into groups of 8, each with a copy of the weights\n"
        "  d.json:2  zero_optimization.zero_hpz_partition_size\n"
        "  do: set it to the number of ranks per node, or remove it",
    ),
    "a pipeline at stage 2": (
        ['"zero_optimization": {"stage": 2}', '"pipeline": {"stages": 2}'],
        "megagpt: a pipeline cannot run at ZeRO stage 2, which partitions gradients between micro-batches\n"
        "  zero_optimization.stage  2   d.json:2\n  pipeline.stages          2   d.json:3\n"
        "  do: set zero_optimization.stage to 1, or remove pipeline and keep ZeRO stage 2",
    ),
    "activations on the host that are not kept": (
        ['"activation_checkpointing": {"cpu_checkpointing": true}'],
        "megagpt: only the inputs of recomputed blocks can be kept in host memory, but no block is recomputed\n"
        "  d.json:2  activation_checkpointing.cpu_checkpointing\n"
        '  do: set activation_checkpointing.number_checkpoints to a number of blocks, or to "auto" for all',
    ),
    "more blocks recomputed than there are": (
        ['"activation_checkpointing": {"number_checkpoints": 99', '"profile": true}'],
        "megagpt: activation_checkpointing.profile is not supported: "
        "megagpt uses torch's activation checkpointing, which would ignore it\n"
        "  d.json:3  activation_checkpointing.profile\n  do: remove it\n"
        "megagpt: the number of recomputed blocks is larger than the number of blocks of the model (12)\n"
        "  d.json:2  activation_checkpointing.number_checkpoints\n"
        '  do: set it to 12 or less, or to "auto" for all',
    ),
    "a world size that is not a multiple of the degrees": (
        ['"sequence_parallel_size": 4'],
        "megagpt: the world size 2 is not a multiple of 4, the ranks of one model replica\n"
        "  d.json:2  sequence_parallel_size\n  do: start a multiple of 4 ranks",
    ),
}

PARALLEL = {
    "more stages than blocks": (
        16,
        ['"pipeline": {"stages": 16}'],
        "megagpt: the pipeline has more stages than the model has blocks\n"
        "  pipeline.stages  16   d.json:2\n  model.n_layer    12   r.yaml:2\n"
        "  do: set pipeline.stages to at most 12",
    ),
    "DeepSpeed's own partition of stages": (
        2,
        ['"pipeline": {"stages": 2, "partition": "uniform", "seed_layers": true}'],
        "megagpt: pipeline.partition is not supported: megagpt balances the stages by the cost of their layers\n"
        "  d.json:2  pipeline.partition\n  do: remove it\n"
        "megagpt: pipeline.seed_layers is not supported: random numbers would depend on the layout\n"
        "  d.json:2  pipeline.seed_layers\n  do: remove it",
    ),
    "heads that the ranks cannot share": (
        16,
        ['"tensor_parallel": {"autotp_size": 8}', '"sequence_parallel_size": 2'],
        "megagpt: the key and value heads cannot be divided evenly among the ranks that split attention\n"
        "  tensor_parallel.autotp_size  8    d.json:2\n  sequence_parallel_size       2    d.json:3\n"
        "  model.n_kv_head              12   r.yaml:2\n"
        "  do: set tensor_parallel.autotp_size times sequence_parallel_size to 1, 2, 3, 4, 6 or 12",
    ),
    "a sequence that the ranks cannot share": (
        3,
        ['"sequence_parallel_size": 3'],
        "megagpt: model.seq_len is not divisible by sequence_parallel_size\n"
        "  sequence_parallel_size  3      d.json:2\n  model.seq_len           1024   r.yaml:2\n"
        "  do: set model.seq_len to a multiple of 3",
    ),
    "keys of AutoTP": (
        2,
        ['"tensor_parallel": {"autotp_size": 2, "preset_model": "llama"}'],
        "megagpt: tensor_parallel.preset_model would be ignored: megagpt splits its layers itself\n"
        "  d.json:2  tensor_parallel.preset_model\n  do: remove it; only autotp_size is needed",
    ),
}

BATCHES = {
    "a micro-batch that does not divide": (
        ['"train_micro_batch_size_per_gpu": 5'],
        "megagpt: train_micro_batch_size_per_gpu does not divide the 32 samples of each data-parallel rank\n"
        "  batch.global_size               64   r.yaml:5\n"
        "  data-parallel ranks             2    from the world size\n"
        "  train_micro_batch_size_per_gpu  5    d.json:2\n"
        "  do: set it to 4 or 8, or batch.global_size to 60 or 70",
    ),
    "a micro-batch beyond the batch": (
        ['"train_micro_batch_size_per_gpu": 64'],
        "megagpt: train_micro_batch_size_per_gpu does not divide the 32 samples of each data-parallel rank\n"
        "  batch.global_size               64   r.yaml:5\n"
        "  data-parallel ranks             2    from the world size\n"
        "  train_micro_batch_size_per_gpu  64   d.json:2\n"
        "  do: set it to 32, or batch.global_size to 128",
    ),
    "an accumulation that does not divide": (
        ['"gradient_accumulation_steps": 3'],
        "megagpt: gradient_accumulation_steps does not divide the 32 samples of each data-parallel rank\n"
        "  batch.global_size            64   r.yaml:5\n"
        "  data-parallel ranks          2    from the world size\n"
        "  gradient_accumulation_steps  3    d.json:2\n"
        "  do: set it to 2 or 4, or batch.global_size to 60 or 66",
    ),
    "sizes that do not multiply up": (
        ['"gradient_accumulation_steps": 4', '"train_micro_batch_size_per_gpu": 4'],
        "megagpt: the product of the batch sizes is not the global batch\n"
        "  batch.global_size               64   r.yaml:5\n"
        "  data-parallel ranks             2    from the world size\n"
        "  train_micro_batch_size_per_gpu  4    d.json:3\n"
        "  gradient_accumulation_steps     4    d.json:2\n"
        '  do: write "auto" for gradient_accumulation_steps: it is derived',
    ),
}


@pytest.mark.parametrize(("lines", "message"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_settings_that_deepspeed_ignores_or_rejects_are_errors(expect_error, lines, message):
    expect_error(lines, message)


@pytest.mark.parametrize(("ranks", "lines", "message"), PARALLEL.values(), ids=PARALLEL)
def test_impossible_parallelism_is_an_error_with_alternatives(expect_error, ranks, lines, message):
    expect_error(lines, message, ranks=ranks)


def test_a_batch_that_does_not_divide_names_numbers_of_ranks_that_hold_whole_copies(expect_error):
    expect_error(
        ['"pipeline": {"stages": 2}'],
        "megagpt: the global batch is not divisible by the number of data-parallel ranks\n"
        "  batch.global_size    64   r.yaml:5\n  data-parallel ranks  3    from the world size\n"
        "  do: set batch.global_size to 63 or 66, or start 2, 4 or 8 ranks",
        ranks=6,
    )


@pytest.mark.parametrize(("lines", "message"), BATCHES.values(), ids=BATCHES)
def test_a_batch_that_does_not_divide_names_the_nearest_sizes_that_do(expect_error, lines, message):
    expect_error(lines, message)


def test_ranks_that_do_not_divide_the_batch_are_an_error(expect_error):
    message = (
        "megagpt: the global batch is not divisible by the number of data-parallel ranks\n"
        "  batch.global_size    64   r.yaml:5\n  data-parallel ranks  3    from the world size\n"
        "  do: set batch.global_size to 63 or 66, or start 1, 2 or 4 ranks"
    )
    expect_error([], message, ranks=3)


NEVER = {
    "bf16.check_grad_overflow": False,
    "zero_optimization.zenflow": {"topk_ratio": 0.1},
    "zero_optimization.offload_optimizer.super_offload": True,
    "zero_optimization.offload_optimizer.ratio": 0.5,
    "zero_optimization.compute_grad_norm": False,
    "zero_optimization.stage3_module_granularity_threshold": 500,
    "zero_optimization.module_granularity_threshold": 500,
    "zero_optimization.leaf_module": {"classes": ["Block"]},
    "zero_optimization.legacy_stage1": True,
    "zero_optimization.round_robin_gradients": True,
    "zero_optimization.elastic_checkpoint": True,
    "torch_autocast.enabled": True,
    "bf16.bf16_master_weights_and_grads": True,
    "bf16.bf16_optimizer_states": True,
    "fp16.fp16_master_weights_and_grads": True,
    "gradient_allreduce_op": "sum",
    "managed_gradient_accumulation": False,
    "zero_force_ds_cpu_optimizer": True,
    "data_parallel_size": 2,
    "pipeline.use_reentrant": True,
    "pipeline.activation_checkpoint_interval": 1,
    "data_efficiency.enabled": True,
    "dataloader_drop_last": True,
    "autotuning.enabled": True,
    "hybrid_engine.enabled": True,
    "expert_parallel.enabled": True,
    "weight_quantization.enabled": True,
    "compile.deepcompile": True,
    "checkpoint.writer": {"type": "fast"},
    "checkpoint.load_universal": True,
    "datastates_ckpt": {"enabled": True},
}


@pytest.mark.parametrize("key", NEVER)
def test_unsupported_setting_is_an_error_with_its_reason(resolve, key):
    with pytest.raises(UserError) as caught:
        resolve(overrides=(f"ds.{key}={json.dumps(NEVER[key])}", "ds.zero_optimization.stage=1"))
    (problem,) = caught.value.problems
    what, _, reason = problem.what.partition(": ")
    assert what == f"{key} is not supported"
    assert reason
    assert problem.where.startswith(f"command line  ds.{key}=")
    assert problem.do


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('"steps_per_print": "inf"', "a whole number, at least 1, or null"),
        ('"steps_per_print": 0', "a whole number, at least 1, or null"),
        ('"communication_data_type": "bfp16"', "fp32, bf16 or fp16, or null"),
        ('"seq_parallel_communication_data_type": 16', "fp32, bf16 or fp16, or null"),
        ('"gradient_predivide_factor": 0', "a number, above 0"),
    ],
)
def test_value_that_deepspeed_rejects_when_it_starts_is_an_error(expect_error, line, wanted):
    key, value = (part.strip() for part in line.split(":"))
    key = key.strip('"')
    expect_error([line], f"megagpt: {key} cannot be {value}\n  d.json:2  {key}\n  do: give {wanted}")


def test_monitor_without_its_package_is_an_error(expect_error, monkeypatch):
    monkeypatch.setattr(unsupported, "find_spec", lambda name: "found" if name == "deepspeed" else None)
    expect_error(
        ['"comet": {"enabled": true}'],
        "megagpt: comet needs the Python package comet_ml, which is not installed\n  d.json:2  comet.enabled\n"
        "  do: pip install comet_ml, or set comet.enabled to false; metrics.jsonl has all values",
    )


def test_monitor_is_not_checked_where_deepspeed_is_missing(resolve, monkeypatch):
    monkeypatch.setattr(unsupported, "find_spec", lambda name: None)
    assert resolve('"comet": {"enabled": true}').config["comet"] == {"enabled": True}
