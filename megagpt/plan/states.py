"""What a rank holds of the model and its training state, in bytes, as DeepSpeed 0.19.8 allocates it for our engines.

The optimizer is DeepSpeed's own wrapper, by stage: none at 0; BF16_Optimizer at 1 in bf16 (runtime/bf16_optimizer.py);
DeepSpeedZeroOptimizer at 1 and 2 (zero/stage_1_and_2.py); DeepSpeedZeroOptimizer_Stage3 (zero/stage3.py). Each
formula is held to the tensors that a real engine holds by tests/parity/test_planned_memory.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megagpt.model import flops
from megagpt.model.sharding import cut_of
from megagpt.plan import muon

if TYPE_CHECKING:
    from megagpt.config.deepspeed import Layout, Resolved
    from megagpt.config.recipe import ModelSection

MASTER_AND_MOMENTS = 12  # bytes a parameter: an fp32 weight and two moments, as in a checkpoint
_FP32 = 4
_REDUCED_AT_ONCE = 500_000_000  # elements: engine.py, MEMORY_OPT_ALLREDUCE_SIZE, which no key sets
_ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes


@dataclass(frozen=True)
class Held:
    """The parameters on one rank: of its stage, cut for tensor parallelism, before ZeRO shares them out."""

    shapes: flops.Shapes
    layers: tuple[int, ...]
    """parameters of each of its layers"""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def largest(self) -> int:
        """Those of the largest parameter."""
        return max(map(math.prod, self.shapes.values()))


def held(section: ModelSection, layout: Layout, stage: int = 0) -> Held:
    """What a rank of a pipeline stage holds; the last stage of a tied model has a copy of the matrix."""
    layers = flops.shapes(section)
    cuts = flops.boundaries(flops.layer_costs(section), layout.pipeline_stages)
    mine = list(range(cuts[stage], cuts[stage + 1]))
    if section.tie_embeddings and len(layers) - 1 in mine and 0 not in mine:
        mine.append(0)
    parts = [_cut(layers[index], section, layout.tensor_parallel) for index in mine]
    whole = {name: shape for part in parts for name, shape in part.items()}
    return Held(whole, tuple(sum(map(math.prod, part.values())) for part in parts))


def _cut(shapes: flops.Shapes, section: ModelSection, degree: int) -> flops.Shapes:
    mine = {}
    for name, shape in shapes.items():
        cut = cut_of(name, section, degree)
        mine[name] = tuple(size // degree if cut and place == cut.dim else size for place, size in enumerate(shape))
    return mine


@dataclass(frozen=True)
class States:
    """Bytes on one rank. What has no word "host" or "NVMe" lies on the device."""

    weights: int
    optimizer: int
    """fp32 weights, where they are tensors of their own, and moments"""
    gradients: int
    """when the backward pass is done"""
    kept_gradients: int
    """of earlier micro-batches, when a backward pass begins"""
    buffers: int
    """for reducing gradients and gathering weights, in the passes"""
    step: int
    """in place of the activations, when gradients are reduced and the optimizer steps"""
    matrices: int = 0
    """in place of activations and gradients, when Muon makes matrices whole"""
    host: int = 0
    pinned: int = 0
    """the part of it that is page-locked"""
    nvme: int = 0


class Zero:
    """What the keys of a resolved config ask for, with DeepSpeed's defaults (zero/config.py)."""

    def __init__(self, resolved: Resolved) -> None:
        self._keys: Mapping[str, Any] = resolved.config.get("zero_optimization", {})
        self.layout, self.precision = resolved.layout, resolved.recipe.precision or "fp32"
        self.muon, self.section = resolved.recipe.optimizer.type == "muon", resolved.recipe.model
        self.element = _ELEMENT[self.precision]
        self.shards = resolved.layout.zero_partitions
        self.accumulates = resolved.layout.accumulation > 1
        # fp16 accumulates in fp16, bf16 in fp32 (config/deepspeed/precision.py)
        self.accumulator = 2 if self.precision == "fp16" else _FP32
        self.reduced = _FP32 if resolved.config.get("communication_data_type") == "fp32" else self.element

    def number(self, key: str, default: int) -> int:
        """A number of elements; DeepSpeed's default where the config says nothing."""
        value = self._keys.get(key)
        return int(default if value in (None, "auto") else value)

    def device(self, what: str) -> str:
        """Where "param" or "optimizer" lies: none, cpu or nvme."""
        return str((self._keys.get(f"offload_{what}") or {}).get("device") or "none")

    @property
    def offloads(self) -> bool:
        """Whether anything waits for the host."""
        return {self.device("optimizer"), self.device("param")} != {"none"}

    def pinned(self, what: str) -> bool:
        """Whether its host memory is page-locked."""
        return bool((self._keys.get(f"offload_{what}") or {}).get("pin_memory"))

    def of(self, what: str, key: str, default: int) -> int:
        """A number in the section offload_`what`."""
        return int((self._keys.get(f"offload_{what}") or {}).get(key) or default)

    @property
    def away(self) -> tuple[int, int]:
        """Bytes a parameter on the host and on NVMe."""
        places = (self.device("optimizer"), self.device("param"))
        return offloaded(self.layout.zero_stage, self.element, self.accumulator, *places)

    @property
    def bucket(self) -> int:
        """Bytes of the buffer in which gradients are gathered for reduction; allocated in full for any model."""
        overlap = self._keys.get("overlap_comm") and self.layout.zero_stage < 3
        return self.number("reduce_bucket_size", 500_000_000) * self.reduced * (2 if overlap else 1)


def offloaded(stage: int, element: int, accumulator: int, optimizer: str, param: str) -> tuple[int, int]:
    """Bytes a parameter that lie on the host and on NVMe, over all ranks together; places are none, cpu or nvme.

    The optimizer: fp32 weight, moments and gradient. With it on the host are, at stages 1 and 2, a copy of the new
    weight, at 3 the sum of gradients, which is there with NVMe too.
    """
    host = nvme = 0
    if optimizer == "cpu":
        host = MASTER_AND_MOMENTS + _FP32 + (accumulator if stage == 3 else element)
    elif optimizer == "nvme":
        host, nvme = accumulator, MASTER_AND_MOMENTS + _FP32
    return host + (element if param == "cpu" else 0), nvme + (element if param == "nvme" else 0)


def states(zero: Zero, mine: Held) -> States:
    """What a rank with these parameters holds."""
    stage = zero.layout.zero_stage
    if stage == 0:
        found = _whole(zero, mine)
    elif stage == 3:
        found = _partitioned(zero, mine)
    elif zero.device("optimizer") != "none":
        found = _flat_offloaded(zero, mine)
    else:
        found = _bf16(zero, mine) if stage == 1 and zero.precision == "bf16" else _flat(zero, mine)
    return muon.applied(found, zero, mine) if zero.muon else found


def _whole(zero: Zero, mine: Held) -> States:
    """Stage 0, fp32: torch's own tensors, and the engine's copy of the gradients while it reduces them."""
    weights = _FP32 * mine.total
    return States(
        weights=weights,
        optimizer=2 * weights,
        gradients=weights,
        kept_gradients=weights if zero.accumulates else 0,
        buffers=0,
        step=_FP32 * min(mine.total, _REDUCED_AT_ONCE + mine.largest),
    )


def _bf16(zero: Zero, mine: Held) -> States:
    """Stage 1 in bf16: gradients twice, in bf16 and summed in fp32, neither shared out; reduced in a bf16 copy.

    Where all fit into one reduction, they are first put side by side in fp32.
    """
    low, high = 2 * mine.total, _FP32 * mine.total
    return States(
        weights=low,
        optimizer=_share(MASTER_AND_MOMENTS * mine.total, zero),
        gradients=low + high,
        kept_gradients=high + (low if zero.accumulates else 0),
        buffers=0,
        step=zero.reduced * mine.total + (high if mine.total <= _REDUCED_AT_ONCE else 0),
    )


def _flat(zero: Zero, mine: Held) -> States:
    """Stages 1 and 2: weights in flat groups, of which each rank has an fp32 copy of its part."""
    gradients = zero.element * mine.total
    kept = gradients
    if zero.layout.zero_stage == 2:
        # bf16 adds into one fp32 buffer; else the sum and what comes to it are both there
        kept = _share(zero.accumulator * mine.total, zero)
        gradients = kept * (2 if zero.accumulates and zero.accumulator == zero.element else 1)
    flattened = zero.layout.zero_stage == 1 or zero.accumulator == zero.element
    return States(
        weights=zero.element * mine.total,
        optimizer=_share(MASTER_AND_MOMENTS * mine.total, zero),
        gradients=gradients,
        kept_gradients=kept if zero.accumulates else 0,
        buffers=zero.bucket,
        step=(_share(_FP32 * mine.total, zero) if flattened else 0) + zero.bucket,
    )


def _flat_offloaded(zero: Zero, mine: Held) -> States:
    """The same with the optimizer on the host, where a buffer is besides."""
    host = _share(zero.away[0] * mine.total, zero) + zero.element * mine.largest
    separate = zero.accumulator != zero.element  # bf16, whose sums in fp32 stay on the device
    gradients = zero.accumulator * mine.total
    if zero.layout.zero_stage == 2:
        gradients = _share(zero.accumulator * mine.total, zero) if separate else 0
        if zero.accumulates and not separate:
            host += _share(zero.element * mine.total, zero)
    return States(
        weights=zero.element * mine.total,
        optimizer=0,
        gradients=gradients,
        kept_gradients=gradients if zero.accumulates else 0,
        buffers=zero.bucket + zero.element * mine.largest,
        step=zero.bucket + zero.element * mine.largest,
        host=host,
        pinned=host if zero.pinned("optimizer") else 0,
    )


def _partitioned(zero: Zero, mine: Held) -> States:
    """Stage 3: a part of every parameter, its fp32 copy (in fp32 too), and of the sum of gradients.

    Weights are gathered ahead of their use, as many as stage3_max_live_parameters allows.
    """
    part = -(-mine.total // zero.shards)
    low = zero.element * part
    summed = zero.accumulator * part
    gathered = zero.element * min(mine.total, _live(zero, mine))
    step = _FP32 * min(part, zero.number("sub_group_size", 1_000_000_000))
    near = zero.device("optimizer") == "none"
    host, nvme = (size * part for size in zero.away)
    pinned = host if zero.pinned("optimizer") or zero.pinned("param") else 0
    passing = 0  # what stands in host memory for what is on NVMe
    if zero.device("optimizer") == "nvme":
        passing += zero.of("optimizer", "buffer_count", 4) * step
    if zero.device("param") == "nvme":
        passing += min(low, zero.element * zero.of("param", "max_in_cpu", 1_000_000_000))
        passing += zero.of("param", "buffer_count", 16) * zero.element * -(-mine.largest // zero.shards)
    hpz = zero.number("zero_hpz_partition_size", 1)
    second = zero.element * -(-mine.total // hpz) if hpz > 1 else 0
    return States(
        weights=(low if zero.device("param") == "none" else 0) + second,
        optimizer=MASTER_AND_MOMENTS * part if near else 0,
        gradients=summed if near else 0,
        kept_gradients=summed if near else 0,
        buffers=zero.bucket + gathered + zero.element * mine.largest,
        step=zero.bucket + (step if near else 0),
        host=host + passing,
        pinned=pinned + (passing if pinned else 0),
        nvme=nvme,
    )


def _live(zero: Zero, mine: Held) -> int:
    """Parameters that are whole at once, at most: small ones always, others up to the limit or the largest layer."""
    threshold = zero.number("stage3_param_persistence_threshold", 100_000)
    small = sum(size for shape in mine.shapes.values() if (size := math.prod(shape)) <= threshold)
    return small + max(zero.number("stage3_max_live_parameters", 1_000_000_000), max(mine.layers))


def _share(size: int, zero: Zero) -> int:
    return -(-size // zero.shards)
