"""Settings that DeepSpeed would ignore, reject later, or implement incorrectly, each with a reason and an alternative.

The behavior was verified with DeepSpeed 0.19.8. Numbers such as #6926 refer to DeepSpeed's issues on GitHub.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from megagpt.config.deepspeed.view import ConfigView
from megagpt.errors import Problem

_ZERO = "zero_optimization"
ZERO_STAGE_KEY = f"{_ZERO}.stage"
_PARAM, _OPTIMIZER = f"{_ZERO}.offload_param", f"{_ZERO}.offload_optimizer"
_QUANTIZED = (
    f"{_ZERO}.zero_quantized_weights",
    f"{_ZERO}.zero_quantized_nontrainable_weights",
    f"{_ZERO}.zero_quantized_gradients",
)
_REMOVE = "remove it"


@dataclass(frozen=True)
class _UnsupportedSetting:
    """A key for which only the given harmless values are supported."""

    key: str
    harmless: tuple[object, ...]
    """the allowed values; the first is DeepSpeed's default"""
    reason: str
    do: str = _REMOVE


_RECIPE_PRECISION = "state precision in the recipe, which keeps fp32 master weights"
UNSUPPORTED_SETTINGS = (
    _UnsupportedSetting(
        f"{_ZERO}.zenflow", (None,), "ZenFlow trains different weights: its steps were ten times as large as AdamW's"
    ),
    _UnsupportedSetting(
        f"{_OPTIMIZER}.super_offload",
        (False,),
        "SuperOffload is for CUDA superchips only, and megagpt has not been tested with it",
    ),
    _UnsupportedSetting(
        f"{_ZERO}.compute_grad_norm", (True,), "megagpt logs the gradient norm of every update and clips by it"
    ),
    _UnsupportedSetting(
        f"{_ZERO}.round_robin_gradients",
        (False,),
        "with it DeepSpeed maps parameters to the wrong offsets, so checkpoints would be saved under wrong names",
    ),
    _UnsupportedSetting(f"{_ZERO}.legacy_stage1", (False,), "DeepSpeed ignores it"),
    _UnsupportedSetting(f"{_ZERO}.elastic_checkpoint", (False,), "megagpt can already resume on any layout"),
    _UnsupportedSetting("torch_autocast.enabled", (False,), "precision belongs to the recipe", _RECIPE_PRECISION),
    _UnsupportedSetting("bf16.bf16_master_weights_and_grads", (False,), "master weights are fp32", _RECIPE_PRECISION),
    _UnsupportedSetting("bf16.bf16_optimizer_states", (False,), "optimizer states are fp32", _RECIPE_PRECISION),
    _UnsupportedSetting("bf16.check_grad_overflow", (True,), "megagpt must skip updates whose gradient is not finite"),
    _UnsupportedSetting("fp16.fp16_master_weights_and_grads", (False,), "master weights are fp32", _RECIPE_PRECISION),
    _UnsupportedSetting(
        "data_types.grad_accum_dtype", (None, "auto", "fp32"), "gradients accumulate in fp32", 'write "auto"'
    ),
    _UnsupportedSetting("gradient_allreduce_op", ("mean",), "the loss is a mean over the whole global batch"),
    _UnsupportedSetting(
        "managed_gradient_accumulation", (True,), "megagpt relies on DeepSpeed to count the micro-batches of an update"
    ),
    _UnsupportedSetting(
        "zero_force_ds_cpu_optimizer", (False,), "megagpt builds the optimizer itself, for offload too"
    ),
    *(
        _UnsupportedSetting(
            f"{_ZERO}.{name}",
            (0,),
            "with it DeepSpeed treats the whole model as one module and loses its gradients: nothing is trained",
        )
        for name in ("stage3_module_granularity_threshold", "module_granularity_threshold")
    ),
    _UnsupportedSetting(
        f"{_ZERO}.leaf_module", (None,), "it is for modules that use a part of their weights, and this model has none"
    ),
    *(
        _UnsupportedSetting(
            f"activation_checkpointing.{name}",
            (False,),
            "megagpt uses torch's activation checkpointing, which would ignore it",
        )
        for name in (
            "partition_activations",
            "contiguous_memory_optimization",
            "synchronize_checkpoint_boundary",
            "profile",
        )
    ),
    _UnsupportedSetting(
        f"{_OPTIMIZER}.ratio",
        (1,),
        "the part that is not offloaded would be updated by DeepSpeed's own AdamW, partly without the schedule",
    ),
    _UnsupportedSetting(
        "data_parallel_size", (None,), "with it DeepSpeed does not reduce gradients over sequence-parallel ranks"
    ),
    _UnsupportedSetting(
        "data_efficiency.enabled", (False,), "it would be ignored: the recipe determines the order of the data"
    ),
    _UnsupportedSetting("dataloader_drop_last", (False,), "it would be ignored: megagpt loads the data itself"),
    _UnsupportedSetting("autotuning.enabled", (False,), "it works only with DeepSpeed's own launch script"),
    _UnsupportedSetting("hybrid_engine.enabled", (False,), "it is for reinforcement learning"),
    _UnsupportedSetting("expert_parallel.enabled", (False,), "the model has no experts"),
    _UnsupportedSetting("weight_quantization.enabled", (False,), "it is for inference"),
    _UnsupportedSetting("compile.deepcompile", (False,), "DeepCompile has not been tested to train the same"),
    _UnsupportedSetting("pipeline.partition", ("best",), "megagpt balances the stages by the cost of their layers"),
    _UnsupportedSetting("pipeline.seed_layers", (False,), "random numbers would depend on the layout"),
    _UnsupportedSetting(
        "pipeline.use_reentrant", (None, False), "a stage whose inputs are token ids would lose its gradient"
    ),
    _UnsupportedSetting(
        "pipeline.activation_checkpoint_interval",
        (0,),
        "recomputation is set by another key, which works on all layouts",
        'set activation_checkpointing.number_checkpoints to a number of blocks, or to "auto" for all',
    ),
    _UnsupportedSetting(
        "checkpoint.writer", (None,), "DeepSpeed's writers fail (0.19.8), and megagpt writes checkpoints itself"
    ),
    _UnsupportedSetting("checkpoint.load_universal", (False,), "megagpt can already resume on any layout"),
    _UnsupportedSetting("datastates_ckpt", (False,), "megagpt writes checkpoints itself"),
)


def unsupported_settings(view: ConfigView, world_size: int) -> Iterator[Problem]:
    """Yield a problem for each unsupported value and each unsupported combination of values.

    Args:
        view: the DeepSpeed config.
        world_size: total number of ranks.
    """
    for setting in UNSUPPORTED_SETTINGS:
        value = view.get(setting.key, setting.harmless[0])
        if not any(value is harmless or value == harmless for harmless in setting.harmless):
            yield view.problem(f"{setting.key} is not supported: {setting.reason}", [setting.key], setting.do)
    yield from _monitors(view)
    if not view.is_valid(ZERO_STAGE_KEY):
        return
    stated = view.explicit(ZERO_STAGE_KEY, 0)
    yield from _reduction(view, stated)
    yield from _offload(view, stated)
    yield from _zeropp(view, stated, world_size)


def _reduction(view: ConfigView, stage: int) -> Iterator[Problem]:
    """Yield problems that DeepSpeed would report only later, when it builds its optimizers.

    The corresponding checks are in `__init__` of DeepSpeed's stage_1_and_2.py and stage3.py.
    """
    key = f"{_ZERO}.allgather_bucket_size"
    size = view.explicit(key, 2)
    if stage < 3 and size % 2:
        what = f"{key} is odd: below ZeRO stage 3 DeepSpeed aligns what it gathers to 2 elements"
        yield view.problem(what, [key], f"set it to {size + 1}")
    scatter = f"{_ZERO}.reduce_scatter"
    if stage < 2 or not view.explicit(scatter, True):
        return
    for key, harmless in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
        if view.explicit(key, harmless) != harmless:
            what = f"{key} is not supported by DeepSpeed at ZeRO stage {stage}, which scatters what it reduces"
            yield view.problem(what, [ZERO_STAGE_KEY, key], f"remove {key}, or set {scatter} to false")


def _monitors(view: ConfigView) -> Iterator[Problem]:
    """Yield monitors whose package is missing, unless DeepSpeed is missing, too: then training runs elsewhere."""
    if find_spec("deepspeed") is None:
        return
    for monitor, package in (("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml")):
        if view.explicit(f"{monitor}.enabled", False) and find_spec(package) is None:
            what = f"{monitor} needs the Python package {package}, which is not installed"
            do = f"pip install {package}, or set {monitor}.enabled to false; metrics.jsonl has all values"
            yield view.problem(what, [f"{monitor}.enabled"], do)


def _device(view: ConfigView, key: str) -> str:
    return str(view.explicit(f"{key}.device", "none"))


def _offload(view: ConfigView, stage: int) -> Iterator[Problem]:
    param, optimizer = _device(view, _PARAM), _device(view, _OPTIMIZER)
    stage_row = [] if view.is_given(ZERO_STAGE_KEY) else [(ZERO_STAGE_KEY, 0, "default")]
    between = [ZERO_STAGE_KEY] if view.is_given(ZERO_STAGE_KEY) else []
    if param != "none" and stage < 3:
        do = f"set {ZERO_STAGE_KEY} to 3, or remove offload_param"
        what = "offload_param is ignored below ZeRO stage 3, where parameters are not partitioned"
        yield view.problem(what, [*between, f"{_PARAM}.device"], do, defaults=stage_row)
    if optimizer != "none" and stage == 0:
        do = f"set {ZERO_STAGE_KEY} to 1, 2 or 3, or remove offload_optimizer"
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
    if view.explicit(hpz, 1) > 1:
        used.append(hpz)
    if used and stage < 3:
        between = [ZERO_STAGE_KEY] if view.is_given(ZERO_STAGE_KEY) else []
        what = "ZeRO++ is ignored below ZeRO stage 3"
        do = f"set {ZERO_STAGE_KEY} to 3, or remove the ZeRO++ keys"
        defaults = [] if between else [(ZERO_STAGE_KEY, 0, "default")]
        yield view.problem(what, [*between, *used], do, defaults=defaults)
    if world_size % view.explicit(hpz, 1):
        size = view.explicit(hpz, 1)
        what = f"the {world_size} ranks cannot be divided into groups of {size}, each with a copy of the weights"
        yield view.problem(what, [hpz], "set it to the number of ranks per node, or remove it")
    offloaded = [f"{key}.device" for key in (_PARAM, _OPTIMIZER) if _device(view, key) != "none"]
    if used and offloaded:
        what = "ZeRO++ with offload does not train: the loss stays constant (DeepSpeed #6926)"
        yield view.problem(what, [*used, *offloaded], "keep one of the two")


def numerics_notes(view: ConfigView) -> Iterator[str]:
    """Yield a note for each key that makes the loss curve depend on the layout."""
    for key in _QUANTIZED:
        if view.explicit(key, False):
            yield f"{key.rpartition('.')[2]} quantizes: the loss curve differs from that of other layouts"
    if view.explicit("communication_data_type", "fp32") != "fp32":
        yield "communication_data_type rounds gradients: the loss curve differs from that of other layouts"
