"""Parameters, ZeRO settings and size of the training state of one rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megagpt.config.recipe.optimizers import OPTIMIZERS
from megagpt.model import flops
from megagpt.model.shapes import ADAMW_BYTES, FP32_BYTES, Shapes, layer_shapes
from megagpt.model.sharding import shard_spec

if TYPE_CHECKING:
    from megagpt.config.deepspeed import Layout, Resolved
    from megagpt.config.recipe import ModelSection

_BYTES_PER_ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class LocalParameters:
    """Parameters of one rank's pipeline stage, split by tensor parallelism but not yet sharded by ZeRO."""

    shapes: Shapes
    layers: tuple[int, ...]
    """number of parameters of each layer of the stage"""

    @property
    def total(self) -> int:
        """Total number of parameters."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def largest(self) -> int:
        """Number of elements of the largest parameter."""
        return max(map(math.prod, self.shapes.values()))


def local_parameters(section: ModelSection, layout: Layout, stage: int = 0) -> LocalParameters:
    """Return the parameters of each rank of a pipeline stage.

    Args:
        section: the shape of the model.
        layout: the layout of the run.
        stage: number of the pipeline stage.

    Returns:
        The parameters. If embedding and head are tied, the last stage holds a copy of the embedding matrix.
    """
    layers = layer_shapes(section)
    boundaries = flops.boundaries(flops.layer_costs(section), layout.pipeline_stages)
    indices = list(range(boundaries[stage], boundaries[stage + 1]))
    if section.tie_embeddings and len(layers) - 1 in indices and 0 not in indices:
        indices.append(0)
    shards = [_shard(layers[index], section, layout.tensor_parallel) for index in indices]
    shapes = {name: shape for shard in shards for name, shape in shard.items()}
    return LocalParameters(shapes, tuple(sum(map(math.prod, shard.values())) for shard in shards))


def _shard(shapes: Shapes, section: ModelSection, degree: int) -> Shapes:
    """Return the shapes of the parameters on one tensor-parallel rank."""
    local = {}
    for name, shape in shapes.items():
        spec = shard_spec(name, section, degree)
        local[name] = tuple(size // degree if spec and dim == spec.dim else size for dim, size in enumerate(shape))
    return local


@dataclass(frozen=True)
class StateBytes:
    """Size of the training state of one rank, in bytes. All except `host`, `pinned` and `nvme` is device memory."""

    weights: int
    optimizer: int
    """size of the moments, and of the fp32 weights if they are separate tensors"""
    gradients: int
    """size of the gradients at the end of the backward pass"""
    kept_gradients: int
    """size of the gradients of earlier micro-batches when a backward pass begins"""
    buffers: int
    """size of the buffers that reduce gradients and gather weights during the forward and backward passes"""
    step: int
    """temporary memory of the reduction and the optimizer step, when the activations have been freed"""
    matrices: int = 0
    """memory for Muon's update of matrices and for gradients that still exist, when the activations have been freed"""
    host: int = 0
    pinned: int = 0
    """size of the page-locked part of `host`"""
    nvme: int = 0


class ZeroSettings:
    """The keys of `zero_optimization` in a resolved config, with DeepSpeed's defaults (zero/config.py)."""

    def __init__(self, resolved: Resolved) -> None:
        self._keys: Mapping[str, Any] = resolved.config.get("zero_optimization", {})
        self.layout = resolved.layout
        self.precision = resolved.recipe.precision or "fp32"
        self.optimizer = OPTIMIZERS[resolved.recipe.optimizer.type]
        self.section = resolved.recipe.model
        self.shards = resolved.layout.zero_partitions
        self.accumulates = resolved.layout.accumulation > 1
        self.element = _BYTES_PER_ELEMENT[self.precision]
        """bytes per weight"""
        self.accumulator = 2 if self.precision == "fp16" else FP32_BYTES
        """bytes per accumulated gradient; fp16 accumulates in fp16, but bf16 in fp32 (config/deepspeed/precision.py)"""
        self.reduced = FP32_BYTES if resolved.config.get("communication_data_type") == "fp32" else self.element
        """bytes per gradient during a reduction"""

    def number(self, key: str, default: int) -> int:
        """Return a number of elements from the config, or DeepSpeed's default."""
        value = self._keys.get(key)
        return int(default if value in (None, "auto") else value)

    def device(self, what: str) -> str:
        """Return the device to which "param" or "optimizer" is offloaded: none, cpu or nvme."""
        return str(self._offload(what).get("device") or "none")

    def is_pinned(self, what: str) -> bool:
        """Return True if "param" or "optimizer" is offloaded to page-locked host memory."""
        return bool(self._offload(what).get("pin_memory"))

    def offload_number(self, what: str, key: str, default: int) -> int:
        """Return a number from the section offload_`what` of the config, or DeepSpeed's default.

        Args:
            what: "param" or "optimizer".
            key: name of the key in the section.
            default: DeepSpeed's default.
        """
        return int(self._offload(what).get(key) or default)

    @property
    def offloads(self) -> bool:
        """True if the optimizer, the parameters or both are offloaded."""
        return {self.device("optimizer"), self.device("param")} != {"none"}

    @property
    def offloaded_bytes(self) -> tuple[int, int]:
        """Number of bytes per parameter that are offloaded to the host, and to NVMe."""
        devices = (self.device("optimizer"), self.device("param"))
        return offloaded_bytes(self.layout.zero_stage, self.element, self.accumulator, *devices)

    @property
    def bucket(self) -> int:
        """Size in bytes of the buffers that collect gradients for reduction, which does not depend on the model."""
        has_two = self._keys.get("overlap_comm") and self.layout.zero_stage < 3
        return self.number("reduce_bucket_size", 500_000_000) * self.reduced * (2 if has_two else 1)

    def _offload(self, what: str) -> Mapping[str, Any]:
        return self._keys.get(f"offload_{what}") or {}


def offloaded_bytes(stage: int, element: int, accumulator: int, optimizer: str, param: str) -> tuple[int, int]:
    """Return the number of offloaded bytes per parameter, summed over all ranks.

    The offloaded optimizer consists of the fp32 weight, moments and gradient. If it is on the host, so is a copy of the
    new weight (stages 1 and 2) or the sum of gradients (stage 3). If it is on NVMe, the sum of gradients is on the
    host.

    Args:
        stage: ZeRO stage.
        element: bytes per weight.
        accumulator: bytes per accumulated gradient.
        optimizer: device to which the optimizer is offloaded: none, cpu or nvme.
        param: device to which the parameters are offloaded: none, cpu or nvme.

    Returns:
        The number of bytes on the host, and on NVMe.
    """
    host = nvme = 0
    if optimizer == "cpu":
        host = ADAMW_BYTES + FP32_BYTES + (accumulator if stage == 3 else element)
    elif optimizer == "nvme":
        host = accumulator
        nvme = ADAMW_BYTES + FP32_BYTES
    return host + (element if param == "cpu" else 0), nvme + (element if param == "nvme" else 0)
