"""What DeepSpeed would ignore, reject later, or do wrongly, with the reason and the way out.

The measurements behind the reasons are DeepSpeed 0.19.8's; the numbers in brackets are its issues.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megagpt.ds_config.view import ConfigView
from megagpt.errors import Problem

_ZERO = "zero_optimization"
ZERO_STAGE_KEY = f"{_ZERO}.stage"
_PARAM, _OPTIMIZER = f"{_ZERO}.offload_param", f"{_ZERO}.offload_optimizer"
_QUANTIZED = (
    f"{_ZERO}.zero_quantized_weights",
    f"{_ZERO}.zero_quantized_nontrainable_weights",
    f"{_ZERO}.zero_quantized_gradients",
)
_AWAY = "take it away"


@dataclass(frozen=True)
class UnsupportedSetting:
    """A key that may not have a value other than the given harmless ones."""

    key: str
    harmless: tuple[object, ...]
    reason: str
    do: str = _AWAY


_RECIPE_PRECISION = "state precision in the recipe, which keeps fp32 master weights"
_UNSUPPORTED = (
    UnsupportedSetting(
        f"{_ZERO}.zenflow", (None,), "ZenFlow trains other weights: ten times the step, measured against AdamW"
    ),
    UnsupportedSetting(
        f"{_OPTIMIZER}.super_offload", (False,), "SuperOffload is for CUDA superchips only, and not proven here"
    ),
    UnsupportedSetting(
        f"{_ZERO}.compute_grad_norm", (True,), "every update logs and clips by the norm of the gradient"
    ),
    UnsupportedSetting(
        f"{_ZERO}.round_robin_gradients",
        (False,),
        "DeepSpeed then looks for each weight where another is, and checkpoints would hold them under wrong names",
    ),
    UnsupportedSetting(f"{_ZERO}.legacy_stage1", (False,), "DeepSpeed ignores it"),
    UnsupportedSetting(f"{_ZERO}.elastic_checkpoint", (False,), "megagpt resumes on any layout by itself"),
    UnsupportedSetting("torch_autocast.enabled", (False,), "precision belongs to the recipe", _RECIPE_PRECISION),
    UnsupportedSetting("bf16.bf16_master_weights_and_grads", (False,), "master weights are fp32", _RECIPE_PRECISION),
    UnsupportedSetting("bf16.bf16_optimizer_states", (False,), "optimizer states are fp32", _RECIPE_PRECISION),
    UnsupportedSetting("bf16.check_grad_overflow", (True,), "no update is made on a gradient that is not finite"),
    UnsupportedSetting("fp16.fp16_master_weights_and_grads", (False,), "master weights are fp32", _RECIPE_PRECISION),
    UnsupportedSetting(
        "data_types.grad_accum_dtype", (None, "auto", "fp32"), "gradients accumulate in fp32", 'write "auto"'
    ),
    UnsupportedSetting("gradient_allreduce_op", ("mean",), "the loss is a mean over the whole global batch"),
    UnsupportedSetting("managed_gradient_accumulation", (True,), "DeepSpeed counts the micro-batches of an update"),
    UnsupportedSetting(
        "zero_force_ds_cpu_optimizer", (False,), "megagpt builds the optimizer itself, also for offload"
    ),
    *(
        UnsupportedSetting(
            f"activation_checkpointing.{name}", (False,), "recomputation is torch's own, and would ignore it"
        )
        for name in (
            "partition_activations",
            "contiguous_memory_optimization",
            "synchronize_checkpoint_boundary",
            "profile",
        )
    ),
    UnsupportedSetting(
        f"{_OPTIMIZER}.ratio",
        (1,),
        "what stays on the device is stepped by an AdamW of DeepSpeed's own, in part without the schedule",
    ),
    UnsupportedSetting(
        "data_parallel_size", (None,), "with it DeepSpeed does not reduce gradients over the sequence ranks"
    ),
    UnsupportedSetting("data_efficiency.enabled", (False,), "it would be ignored: the data order is the recipe's"),
    UnsupportedSetting("dataloader_drop_last", (False,), "it would be ignored: megagpt loads the data itself"),
    UnsupportedSetting("autotuning.enabled", (False,), "it works through DeepSpeed's own script only"),
    UnsupportedSetting("hybrid_engine.enabled", (False,), "it is for reinforcement learning"),
    UnsupportedSetting("expert_parallel.enabled", (False,), "the model has no experts"),
    UnsupportedSetting("weight_quantization.enabled", (False,), "it is for inference"),
    UnsupportedSetting("compile.deepcompile", (False,), "DeepCompile is not proven to train the same"),
    UnsupportedSetting("pipeline.partition", ("best",), "megagpt cuts the stages by what their layers cost"),
    UnsupportedSetting("pipeline.seed_layers", (False,), "the layout would change the random numbers"),
    UnsupportedSetting(
        "pipeline.use_reentrant", (None, False), "a stage that begins with token ids would lose its gradient"
    ),
    UnsupportedSetting(
        "pipeline.activation_checkpoint_interval",
        (0,),
        "recomputation has one key for all layouts",
        'set activation_checkpointing.number_checkpoints to a number of blocks, or to "auto" for all',
    ),
    UnsupportedSetting(
        "checkpoint.writer", (None,), "DeepSpeed's writers fail (0.19.8), and megagpt publishes checkpoints"
    ),
    UnsupportedSetting("checkpoint.load_universal", (False,), "megagpt resumes on any layout by itself"),
    UnsupportedSetting("datastates_ckpt", (False,), "megagpt publishes checkpoints itself"),
)


def unsupported_settings(view: ConfigView, world_size: int) -> Iterator[Problem]:
    """Every refused value and combination on so many ranks."""
    for never in _UNSUPPORTED:
        value = view.get(never.key, never.harmless[0])
        if not any(value is harmless or value == harmless for harmless in never.harmless):
            yield view.problem(f"{never.key} is refused: {never.reason}", [never.key], never.do)
    if not view.is_valid(ZERO_STAGE_KEY):
        return
    stated = view.explicit(ZERO_STAGE_KEY, 0)
    yield from _offload(view, stated)
    yield from _zeropp(view, stated, world_size)


def _device(view: ConfigView, key: str) -> str:
    return str(view.explicit(f"{key}.device", "none"))


def _offload(view: ConfigView, stage: int) -> Iterator[Problem]:
    param, optimizer = _device(view, _PARAM), _device(view, _OPTIMIZER)
    stage_row = [] if view.is_given(ZERO_STAGE_KEY) else [(ZERO_STAGE_KEY, 0, "default")]
    between = [ZERO_STAGE_KEY] if view.is_given(ZERO_STAGE_KEY) else []
    if param != "none" and stage < 3:
        do = f"set {ZERO_STAGE_KEY} to 3, or take offload_param away"
        what = "offload_param is ignored below ZeRO stage 3, where parameters are not partitioned"
        yield view.problem(what, [*between, f"{_PARAM}.device"], do, defaults=stage_row)
    if optimizer != "none" and stage == 0:
        do = f"set {ZERO_STAGE_KEY} to 1, 2 or 3, or take offload_optimizer away"
        what = "offload_optimizer is ignored at ZeRO stage 0, where nothing is partitioned"
        yield view.problem(what, [*between, f"{_OPTIMIZER}.device"], do, defaults=stage_row)
    elif optimizer == "nvme" and stage < 3:
        do = f"set {ZERO_STAGE_KEY} to 3, or the device to cpu"
        what = "offload to NVMe needs ZeRO stage 3"
        yield view.problem(what, [*between, f"{_OPTIMIZER}.device"], do)
    for key, device in ((_PARAM, param), (_OPTIMIZER, optimizer)):
        if device == "nvme" and not view.explicit(f"{key}.nvme_path", None):
            do = f"give {key}.nvme_path: a directory on the local disk of every node"
            yield view.problem(f"{key} to NVMe needs a path", [f"{key}.device"], do)


def _zeropp(view: ConfigView, stage: int, world_size: int) -> Iterator[Problem]:
    hpz = f"{_ZERO}.zero_hpz_partition_size"
    used = [key for key in _QUANTIZED if view.explicit(key, False)]
    used += [hpz] if view.explicit(hpz, 1) > 1 else []
    if used and stage < 3:
        between = [ZERO_STAGE_KEY] if view.is_given(ZERO_STAGE_KEY) else []
        what = "ZeRO++ is ignored below ZeRO stage 3"
        do = f"set {ZERO_STAGE_KEY} to 3, or take the ZeRO++ keys away"
        defaults = [] if between else [(ZERO_STAGE_KEY, 0, "default")]
        yield view.problem(what, [*between, *used], do, defaults=defaults)
    if world_size % view.explicit(hpz, 1):
        what = f"the {world_size} ranks cannot be cut into groups of {view.explicit(hpz, 1)} that hold the weights"
        yield view.problem(what, [hpz], "set it to the ranks of one node, or take it away")
    offloaded = [f"{key}.device" for key in (_PARAM, _OPTIMIZER) if _device(view, key) != "none"]
    if used and offloaded:
        what = "ZeRO++ with offload does not train: the loss stays constant (DeepSpeed #6926)"
        yield view.problem(what, [*used, *offloaded], "keep one of the two")


def numerics_notes(view: ConfigView) -> Iterator[str]:
    """A note for each key with which the layout moves the numbers."""
    for key in _QUANTIZED:
        if view.explicit(key, False):
            yield f"{key.rpartition('.')[2]} quantizes: the curve is not that of other layouts"
    if view.explicit("communication_data_type", "fp32") != "fp32":
        yield "communication_data_type rounds gradients on the wire: the curve is not that of other layouts"
