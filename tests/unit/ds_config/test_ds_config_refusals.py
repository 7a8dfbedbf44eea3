"""One row per layout that DeepSpeed would ignore or reject, or that does not divide: the whole message."""

from __future__ import annotations

import json

import pytest

from megagpt.errors import UserError

COMBINATIONS = {
    "both low precisions": (
        ['"bf16": {"enabled": true}', '"fp16": {"enabled": true}'],
        "megagpt: bf16 and fp16 are both switched on\n  bf16.enabled  true   d.json:2\n"
        "  fp16.enabled  true   d.json:3\n"
        '  do: keep one of the two, or write "auto" in both and state precision in the recipe',
    ),
    "offload_param below stage 3": (
        ['"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}'],
        "megagpt: offload_param is ignored below ZeRO stage 3, where parameters are not partitioned\n"
        "  zero_optimization.stage                 2       d.json:2\n"
        '  zero_optimization.offload_param.device  "cpu"   d.json:2\n'
        "  do: set zero_optimization.stage to 3, or take offload_param away",
    ),
    "offload_optimizer at stage 0": (
        ['"zero_optimization": {"offload_optimizer": {"device": "cpu"}}'],
        "megagpt: offload_optimizer is ignored at ZeRO stage 0, where nothing is partitioned\n"
        '  zero_optimization.offload_optimizer.device  "cpu"   d.json:2\n'
        "  zero_optimization.stage                     0       default\n"
        "  do: set zero_optimization.stage to 1, 2 or 3, or take offload_optimizer away",
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
        "  do: set zero_optimization.stage to 3, or take the ZeRO++ keys away",
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
        "  do: take prescale_gradients away, or set zero_optimization.reduce_scatter to false",
    ),
    "half a node": (
        ['"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}'],
        "megagpt: the 2 ranks cannot be cut into groups of 8 that hold the weights\n"
        "  d.json:2  zero_optimization.zero_hpz_partition_size\n"
        "  do: set it to the ranks of one node, or take it away",
    ),
    "a pipeline at stage 2": (
        ['"zero_optimization": {"stage": 2}', '"pipeline": {"stages": 2}'],
        "megagpt: a pipeline cannot run at ZeRO stage 2: its gradients must stay whole between micro-batches\n"
        "  zero_optimization.stage  2   d.json:2\n  pipeline.stages          2   d.json:3\n"
        "  do: set zero_optimization.stage to 1, or take pipeline away and keep ZeRO stage 2",
    ),
    "activations on the host that are not kept": (
        ['"activation_checkpointing": {"cpu_checkpointing": true}'],
        "megagpt: only what a recomputed block starts from can wait in host memory, and no block is recomputed\n"
        "  d.json:2  activation_checkpointing.cpu_checkpointing\n"
        '  do: set activation_checkpointing.number_checkpoints to a number of blocks, or to "auto" for all',
    ),
    "more blocks recomputed than there are": (
        ['"activation_checkpointing": {"number_checkpoints": 99', '"profile": true}'],
        "megagpt: activation_checkpointing.profile is refused: recomputation is torch's own, and would ignore it\n"
        "  d.json:3  activation_checkpointing.profile\n  do: take it away\n"
        "megagpt: more blocks are to be recomputed than the model has (12)\n"
        "  d.json:2  activation_checkpointing.number_checkpoints\n"
        '  do: set it to 12 or less, or to "auto" for all',
    ),
    "a world that the degrees do not divide": (
        ['"sequence_parallel_size": 4'],
        "megagpt: a world of 2 does not divide by 4, the ranks of one copy\n  d.json:2  sequence_parallel_size\n"
        "  do: start a multiple of 4 ranks",
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
    "stages cut in DeepSpeed's way": (
        2,
        ['"pipeline": {"stages": 2, "partition": "uniform", "seed_layers": true}'],
        "megagpt: pipeline.partition is refused: megagpt cuts the stages by what their layers cost\n"
        "  d.json:2  pipeline.partition\n  do: take it away\n"
        "megagpt: pipeline.seed_layers is refused: the layout would change the random numbers\n"
        "  d.json:2  pipeline.seed_layers\n  do: take it away",
    ),
    "heads that the ranks cannot share": (
        16,
        ['"tensor_parallel": {"autotp_size": 8}', '"sequence_parallel_size": 2'],
        "megagpt: the key and value heads cannot be shared evenly by the ranks that cut attention\n"
        "  tensor_parallel.autotp_size  8    d.json:2\n  sequence_parallel_size       2    d.json:3\n"
        "  model.n_kv_head              12   r.yaml:2\n"
        "  do: set tensor_parallel.autotp_size times sequence_parallel_size to 1, 2, 3, 4, 6 or 12",
    ),
    "a sequence that the ranks cannot share": (
        3,
        ['"sequence_parallel_size": 3'],
        "megagpt: model.seq_len does not divide by sequence_parallel_size\n"
        "  sequence_parallel_size  3      d.json:2\n  model.seq_len           1024   r.yaml:2\n"
        "  do: set model.seq_len to a multiple of 3",
    ),
    "keys of AutoTP": (
        2,
        ['"tensor_parallel": {"autotp_size": 2, "preset_model": "llama"}'],
        "megagpt: tensor_parallel.preset_model would be ignored: megagpt knows how its layers are cut\n"
        "  d.json:2  tensor_parallel.preset_model\n  do: take it away; autotp_size is all that is needed",
    ),
}

BATCHES = {
    "a micro-batch that does not divide": (
        ['"train_micro_batch_size_per_gpu": 5'],
        "megagpt: train_micro_batch_size_per_gpu does not divide the 32 samples of a rank\n"
        "  batch.global_size               64   r.yaml:5\n"
        "  data-parallel ranks             2    from the world size\n"
        "  train_micro_batch_size_per_gpu  5    d.json:2\n"
        "  do: set it to 4 or 8, or batch.global_size to 60 or 70",
    ),
    "a micro-batch beyond the batch": (
        ['"train_micro_batch_size_per_gpu": 64'],
        "megagpt: train_micro_batch_size_per_gpu does not divide the 32 samples of a rank\n"
        "  batch.global_size               64   r.yaml:5\n"
        "  data-parallel ranks             2    from the world size\n"
        "  train_micro_batch_size_per_gpu  64   d.json:2\n"
        "  do: set it to 32, or batch.global_size to 128",
    ),
    "an accumulation that does not divide": (
        ['"gradient_accumulation_steps": 3'],
        "megagpt: gradient_accumulation_steps does not divide the 32 samples of a rank\n"
        "  batch.global_size            64   r.yaml:5\n"
        "  data-parallel ranks          2    from the world size\n"
        "  gradient_accumulation_steps  3    d.json:2\n"
        "  do: set it to 2 or 4, or batch.global_size to 60 or 66",
    ),
    "sizes that do not multiply up": (
        ['"gradient_accumulation_steps": 4', '"train_micro_batch_size_per_gpu": 4'],
        "megagpt: the batch sizes do not multiply up to the global batch\n"
        "  batch.global_size               64   r.yaml:5\n"
        "  data-parallel ranks             2    from the world size\n"
        "  train_micro_batch_size_per_gpu  4    d.json:3\n"
        "  gradient_accumulation_steps     4    d.json:2\n"
        '  do: write "auto" for gradient_accumulation_steps: it is derived',
    ),
}


@pytest.mark.parametrize(("lines", "message"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_what_deepspeed_would_ignore_or_reject_is_refused_with_a_way_out(told, lines, message):
    told(lines, message)


@pytest.mark.parametrize(("ranks", "lines", "message"), PARALLEL.values(), ids=PARALLEL)
def test_a_model_that_cannot_be_cut_so_is_refused_with_what_can(told, ranks, lines, message):
    told(lines, message, ranks=ranks)


def test_a_batch_that_does_not_divide_names_numbers_of_ranks_that_hold_whole_copies(told):
    told(
        ['"pipeline": {"stages": 2}'],
        "megagpt: the global batch does not divide by the ranks\n"
        "  batch.global_size    64   r.yaml:5\n  data-parallel ranks  3    from the world size\n"
        "  do: set batch.global_size to 63 or 66, or start 2, 4 or 8 ranks",
        ranks=6,
    )


@pytest.mark.parametrize(("lines", "message"), BATCHES.values(), ids=BATCHES)
def test_a_batch_that_does_not_divide_names_the_nearest_sizes_that_do(told, lines, message):
    told(lines, message)


def test_ranks_that_do_not_divide_the_batch_aretold(told):
    message = (
        "megagpt: the global batch does not divide by the ranks\n"
        "  batch.global_size    64   r.yaml:5\n  data-parallel ranks  3    from the world size\n"
        "  do: set batch.global_size to 63 or 66, or start 1, 2 or 4 ranks"
    )
    told([], message, ranks=3)


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
def test_what_would_do_harm_is_refused_with_its_reason(resolve, key):
    with pytest.raises(UserError) as caught:
        resolve(words=(f"ds.{key}={json.dumps(NEVER[key])}", "ds.zero_optimization.stage=1"))
    (problem,) = caught.value.problems
    what, _, reason = problem.what.partition(": ")
    assert what == f"{key} is refused"
    assert reason
    assert problem.where.startswith(f"command line  ds.{key}=")
    assert problem.do
