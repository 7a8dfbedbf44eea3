"""Size of a rank's training state, as DeepSpeed 0.19.8 allocates it for megagpt's engines.

The formulas follow DeepSpeed's optimizer wrappers. There is none at stage 0. At stage 1 in bf16 it is BF16_Optimizer
(runtime/bf16_optimizer.py), otherwise at stages 1 and 2 DeepSpeedZeroOptimizer (zero/stage_1_and_2.py), and at stage 3
DeepSpeedZeroOptimizer_Stage3 (zero/stage3.py). tests/parity/test_planned_memory.py compares each formula with the
tensors of a real engine.
"""

from __future__ import annotations

import math

from megagpt.model.shapes import ADAMW_BYTES, FP32_BYTES
from megagpt.plan import muon
from megagpt.plan.rank_state import LocalParameters, StateBytes, ZeroSettings

# Number of elements per reduction at stage 0. This is MEMORY_OPT_ALLREDUCE_SIZE in DeepSpeed's engine.py, which no
# config key can change.
_ALLREDUCE_ELEMENTS = 500_000_000


def state_bytes(zero: ZeroSettings, local: LocalParameters) -> StateBytes:
    """Return the size of the training state of a rank, in bytes.

    Args:
        zero: the ZeRO settings.
        local: the rank's parameters.
    """
    stage = zero.layout.zero_stage
    if stage == 0:
        state = _stage0(zero, local)
    elif stage == 3:
        state = _stage3(zero, local)
    elif zero.device("optimizer") != "none":
        state = _stage1_2_offloaded(zero, local)
    elif stage == 1 and zero.precision == "bf16":
        state = _stage1_bf16(zero, local)
    else:
        state = _stage1_2(zero, local)
    return muon.adjust(state, zero, local) if zero.optimizer.steps_on_whole_matrices else state


def _stage0(zero: ZeroSettings, local: LocalParameters) -> StateBytes:
    """Return the state at stage 0, which is always in fp32.

    It consists of torch's own tensors, and a copy of the gradients while the engine reduces them.
    """
    weights = FP32_BYTES * local.total
    return StateBytes(
        weights=weights,
        optimizer=2 * weights,
        gradients=weights,
        kept_gradients=weights if zero.accumulates else 0,
        buffers=0,
        step=FP32_BYTES * min(local.total, _ALLREDUCE_ELEMENTS + local.largest),
    )


def _stage1_bf16(zero: ZeroSettings, local: LocalParameters) -> StateBytes:
    """Return the state at stage 1 in bf16.

    Gradients are not sharded, and exist both in bf16 and, accumulated, in fp32. They are reduced in a bf16 copy. If all
    gradients fit into one reduction, they are first flattened into an fp32 tensor.
    """
    low = 2 * local.total
    high = FP32_BYTES * local.total
    return StateBytes(
        weights=low,
        optimizer=_per_shard(ADAMW_BYTES * local.total, zero),
        gradients=low + high,
        kept_gradients=high + (low if zero.accumulates else 0),
        buffers=0,
        step=zero.reduced * local.total + (high if local.total <= _ALLREDUCE_ELEMENTS else 0),
    )


def _stage1_2(zero: ZeroSettings, local: LocalParameters) -> StateBytes:
    """Return the state at stages 1 and 2.

    Weights are in flat buffers, and each rank has an fp32 copy of its partition.
    """
    gradients = zero.element * local.total
    kept = gradients
    if zero.layout.zero_stage == 2:
        # In bf16, gradients are added to a single fp32 buffer. Otherwise both the sum and the addend exist.
        kept = _per_shard(zero.accumulator * local.total, zero)
        gradients = kept * (2 if zero.accumulates and zero.accumulator == zero.element else 1)
    is_flattened = zero.layout.zero_stage == 1 or zero.accumulator == zero.element
    return StateBytes(
        weights=zero.element * local.total,
        optimizer=_per_shard(ADAMW_BYTES * local.total, zero),
        gradients=gradients,
        kept_gradients=kept if zero.accumulates else 0,
        buffers=zero.bucket,
        step=(_per_shard(FP32_BYTES * local.total, zero) if is_flattened else 0) + zero.bucket,
    )


def _stage1_2_offloaded(zero: ZeroSettings, local: LocalParameters) -> StateBytes:
    """Return the state at stages 1 and 2 with the optimizer on the host.

    The host also holds a buffer for the largest gradient.
    """
    host = _per_shard(zero.offloaded_bytes[0] * local.total, zero) + zero.element * local.largest
    sums_in_fp32 = zero.accumulator != zero.element  # This is the case for bf16. These sums stay on the device.
    gradients = zero.accumulator * local.total
    if zero.layout.zero_stage == 2:
        gradients = _per_shard(zero.accumulator * local.total, zero) if sums_in_fp32 else 0
        if zero.accumulates and not sums_in_fp32:
            host += _per_shard(zero.element * local.total, zero)
    return StateBytes(
        weights=zero.element * local.total,
        optimizer=0,
        gradients=gradients,
        kept_gradients=gradients if zero.accumulates else 0,
        buffers=zero.bucket + zero.element * local.largest,
        step=zero.bucket + zero.element * local.largest,
        host=host,
        pinned=host if zero.is_pinned("optimizer") else 0,
    )


def _stage3(zero: ZeroSettings, local: LocalParameters) -> StateBytes:
    """Return the state at stage 3.

    Each rank holds a partition of every parameter, of its fp32 copy and of the sum of its gradients. The fp32 copy
    exists even if training is in fp32. Weights are gathered before they are used, up to stage3_max_live_parameters.
    """
    partition = -(-local.total // zero.shards)
    low = zero.element * partition
    summed = zero.accumulator * partition
    gathered = zero.element * min(local.total, _live_parameters(zero, local))
    step = FP32_BYTES * min(partition, zero.number("sub_group_size", 1_000_000_000))
    on_device = zero.device("optimizer") == "none"
    host, nvme = (size * partition for size in zero.offloaded_bytes)
    pinned = host if zero.is_pinned("optimizer") or zero.is_pinned("param") else 0
    nvme_buffers = 0  # bytes of host memory for the transfer of tensors from and to NVMe
    if zero.device("optimizer") == "nvme":
        nvme_buffers += zero.offload_number("optimizer", "buffer_count", 4) * step
    if zero.device("param") == "nvme":
        nvme_buffers += min(low, zero.element * zero.offload_number("param", "max_in_cpu", 1_000_000_000))
        largest = zero.element * -(-local.largest // zero.shards)
        nvme_buffers += zero.offload_number("param", "buffer_count", 16) * largest
    hpz = zero.number("zero_hpz_partition_size", 1)
    secondary = zero.element * -(-local.total // hpz) if hpz > 1 else 0
    return StateBytes(
        weights=(low if zero.device("param") == "none" else 0) + secondary,
        optimizer=ADAMW_BYTES * partition if on_device else 0,
        gradients=summed if on_device else 0,
        kept_gradients=summed if on_device else 0,
        buffers=zero.bucket + gathered + zero.element * local.largest,
        step=zero.bucket + (step if on_device else 0),
        host=host + nvme_buffers,
        pinned=pinned + (nvme_buffers if pinned else 0),
        nvme=nvme,
    )


def _live_parameters(zero: ZeroSettings, local: LocalParameters) -> int:
    """Return the maximum number of gathered parameters.

    Small parameters are always gathered. Others are gathered up to a limit, which is at least the largest layer.
    """
    threshold = zero.number("stage3_param_persistence_threshold", 100_000)
    small = sum(size for shape in local.shapes.values() if (size := math.prod(shape)) <= threshold)
    return small + max(zero.number("stage3_max_live_parameters", 1_000_000_000), max(local.layers))


def _per_shard(size: int, zero: ZeroSettings) -> int:
    return -(-size // zero.shards)
