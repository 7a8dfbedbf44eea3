"""What DeepSpeed would ignore, reject later, or do wrongly, with the reason and the way out.

The measurements behind the reasons are DeepSpeed 0.19.8's; the numbers in brackets are its issues.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megagpt.ds_config.view import View
from megagpt.errors import Problem

_ZERO = "zero_optimization"
STAGE = f"{_ZERO}.stage"
_PARAM, _OPTIMIZER = f"{_ZERO}.offload_param", f"{_ZERO}.offload_optimizer"
_QUANTIZED = (
    f"{_ZERO}.zero_quantized_weights",
    f"{_ZERO}.zero_quantized_nontrainable_weights",
    f"{_ZERO}.zero_quantized_gradients",
)
_AWAY = "take it away"


@dataclass(frozen=True)
class _Never:
    """A key that may not have a value other than the given harmless ones."""

    key: str
    harmless: tuple[object, ...]
    reason: str
    do: str = _AWAY


_RECIPE_PRECISION = "state precision in the recipe, which keeps fp32 master weights"
_NEVER = (
    _Never(f"{_ZERO}.zenflow", (None,), "ZenFlow trains other weights: ten times the step, measured against AdamW"),
    _Never(f"{_OPTIMIZER}.super_offload", (False,), "SuperOffload is for CUDA superchips only, and not proven here"),
    _Never(f"{_ZERO}.compute_grad_norm", (True,), "every update logs and clips by the norm of the gradient"),
    _Never(
        f"{_ZERO}.round_robin_gradients",
        (False,),
        "DeepSpeed then looks for each weight where another is, and checkpoints would hold them under wrong names",
    ),
    *(
        _Never(
            f"{_ZERO}.{name}",
            (0,),
            "DeepSpeed then takes the whole model for one module, whose gradients it loses: nothing is trained",
        )
        for name in ("stage3_module_granularity_threshold", "module_granularity_threshold")
    ),
    _Never(f"{_ZERO}.leaf_module", (None,), "it is for modules that use part of their weights, and the model has none"),
    _Never(f"{_ZERO}.legacy_stage1", (False,), "DeepSpeed ignores it"),
    _Never(f"{_ZERO}.elastic_checkpoint", (False,), "megagpt resumes on any layout by itself"),
    _Never("torch_autocast.enabled", (False,), "precision belongs to the recipe", _RECIPE_PRECISION),
    _Never("bf16.bf16_master_weights_and_grads", (False,), "master weights are fp32", _RECIPE_PRECISION),
    _Never("bf16.bf16_optimizer_states", (False,), "optimizer states are fp32", _RECIPE_PRECISION),
    _Never("bf16.check_grad_overflow", (True,), "no update is made on a gradient that is not finite"),
    _Never("fp16.fp16_master_weights_and_grads", (False,), "master weights are fp32", _RECIPE_PRECISION),
    _Never("data_types.grad_accum_dtype", (None, "auto", "fp32"), "gradients accumulate in fp32", 'write "auto"'),
    _Never("gradient_allreduce_op", ("mean",), "the loss is a mean over the whole global batch"),
    _Never("managed_gradient_accumulation", (True,), "DeepSpeed counts the micro-batches of an update"),
    _Never("zero_force_ds_cpu_optimizer", (False,), "megagpt builds the optimizer itself, also for offload"),
    *(
        _Never(f"activation_checkpointing.{name}", (False,), "recomputation is torch's own, and would ignore it")
        for name in (
            "partition_activations",
            "contiguous_memory_optimization",
            "synchronize_checkpoint_boundary",
            "profile",
        )
    ),
    _Never(
        f"{_OPTIMIZER}.ratio",
        (1,),
        "what stays on the device is stepped by an AdamW of DeepSpeed's own, in part without the schedule",
    ),
    _Never("data_parallel_size", (None,), "with it DeepSpeed does not reduce gradients over the sequence ranks"),
    _Never("data_efficiency.enabled", (False,), "it would be ignored: the data order is the recipe's"),
    _Never("dataloader_drop_last", (False,), "it would be ignored: megagpt loads the data itself"),
    _Never("autotuning.enabled", (False,), "it works through DeepSpeed's own script only"),
    _Never("hybrid_engine.enabled", (False,), "it is for reinforcement learning"),
    _Never("expert_parallel.enabled", (False,), "the model has no experts"),
    _Never("weight_quantization.enabled", (False,), "it is for inference"),
    _Never("compile.deepcompile", (False,), "DeepCompile is not proven to train the same"),
    _Never("pipeline.partition", ("best",), "megagpt cuts the stages by what their layers cost"),
    _Never("pipeline.seed_layers", (False,), "the layout would change the random numbers"),
    _Never("pipeline.use_reentrant", (None, False), "a stage that begins with token ids would lose its gradient"),
    _Never(
        "pipeline.activation_checkpoint_interval",
        (0,),
        "recomputation has one key for all layouts",
        'set activation_checkpointing.number_checkpoints to a number of blocks, or to "auto" for all',
    ),
    _Never("checkpoint.writer", (None,), "DeepSpeed's writers fail (0.19.8), and megagpt publishes checkpoints"),
    _Never("checkpoint.load_universal", (False,), "megagpt resumes on any layout by itself"),
    _Never("datastates_ckpt", (False,), "megagpt publishes checkpoints itself"),
)


def refusals(view: View, world_size: int) -> Iterator[Problem]:
    """Every refused value and combination on so many ranks."""
    for never in _NEVER:
        value = view.get(never.key, never.harmless[0])
        if not any(value is harmless or value == harmless for harmless in never.harmless):
            yield view.problem(f"{never.key} is refused: {never.reason}", [never.key], never.do)
    if not view.sound(STAGE):
        return
    stated = view.number(STAGE, 0)
    yield from _reduction(view, stated)
    yield from _offload(view, stated)
    yield from _zeropp(view, stated, world_size)


def _reduction(view: View, stage: int) -> Iterator[Problem]:
    """Settings that DeepSpeed's optimizers reject only when they are built (stage_1_and_2.py, stage3.py: __init__)."""
    key = f"{_ZERO}.allgather_bucket_size"
    size = view.number(key, 2)
    if stage < 3 and size % 2:
        what = f"{key} is odd: below ZeRO stage 3 DeepSpeed aligns what it gathers to 2 elements"
        yield view.problem(what, [key], f"set it to {size + 1}")
    scatter = f"{_ZERO}.reduce_scatter"
    if stage < 2 or not view.number(scatter, True):
        return
    for key, harmless in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
        if view.number(key, harmless) != harmless:
            what = f"{key} is not supported by DeepSpeed at ZeRO stage {stage}, which scatters what it reduces"
            yield view.problem(what, [STAGE, key], f"take {key} away, or set {scatter} to false")


def _device(view: View, key: str) -> str:
    return str(view.number(f"{key}.device", "none"))


def _offload(view: View, stage: int) -> Iterator[Problem]:
    param, optimizer = _device(view, _PARAM), _device(view, _OPTIMIZER)
    stage_row = [] if view.given(STAGE) else [(STAGE, 0, "default")]
    between = [STAGE] if view.given(STAGE) else []
    if param != "none" and stage < 3:
        do = f"set {STAGE} to 3, or take offload_param away"
        what = "offload_param is ignored below ZeRO stage 3, where parameters are not partitioned"
        yield view.problem(what, [*between, f"{_PARAM}.device"], do, defaults=stage_row)
    if optimizer != "none" and stage == 0:
        do = f"set {STAGE} to 1, 2 or 3, or take offload_optimizer away"
        what = "offload_optimizer is ignored at ZeRO stage 0, where nothing is partitioned"
        yield view.problem(what, [*between, f"{_OPTIMIZER}.device"], do, defaults=stage_row)
    elif optimizer == "nvme" and stage < 3:
        do = f"set {STAGE} to 3, or the device to cpu"
        what = "offload to NVMe needs ZeRO stage 3"
        yield view.problem(what, [*between, f"{_OPTIMIZER}.device"], do)
    for key, device in ((_PARAM, param), (_OPTIMIZER, optimizer)):
        if device == "nvme" and not view.number(f"{key}.nvme_path", None):
            do = f"give {key}.nvme_path: a directory on the local disk of every node"
            yield view.problem(f"{key} to NVMe needs a path", [f"{key}.device"], do)


def _zeropp(view: View, stage: int, world_size: int) -> Iterator[Problem]:
    hpz = f"{_ZERO}.zero_hpz_partition_size"
    used = [key for key in _QUANTIZED if view.number(key, False)]
    used += [hpz] if view.number(hpz, 1) > 1 else []
    if used and stage < 3:
        between = [STAGE] if view.given(STAGE) else []
        what = "ZeRO++ is ignored below ZeRO stage 3"
        do = f"set {STAGE} to 3, or take the ZeRO++ keys away"
        defaults = [] if between else [(STAGE, 0, "default")]
        yield view.problem(what, [*between, *used], do, defaults=defaults)
    if world_size % view.number(hpz, 1):
        what = f"the {world_size} ranks cannot be cut into groups of {view.number(hpz, 1)} that hold the weights"
        yield view.problem(what, [hpz], "set it to the ranks of one node, or take it away")
    offloaded = [f"{key}.device" for key in (_PARAM, _OPTIMIZER) if _device(view, key) != "none"]
    if used and offloaded:
        what = "ZeRO++ with offload does not train: the loss stays constant (DeepSpeed #6926)"
        yield view.problem(what, [*used, *offloaded], "keep one of the two")


def layout_dependent(view: View) -> Iterator[str]:
    """A note for each key with which the layout moves the numbers."""
    for key in _QUANTIZED:
        if view.number(key, False):
            yield f"{key.rpartition('.')[2]} quantizes: the curve is not that of other layouts"
    if view.number("communication_data_type", "fp32") != "fp32":
        yield "communication_data_type rounds gradients on the wire: the curve is not that of other layouts"
