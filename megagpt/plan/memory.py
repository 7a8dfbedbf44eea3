"""Estimate of the memory of the fullest rank, by kind of tensor, at the moment of its peak.

The estimate is computed from recipe, config and layout, without building the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megagpt.model.shapes import FP32_BYTES
from megagpt.plan import activations
from megagpt.plan.activations import MicroBatchShape
from megagpt.plan.rank_state import LocalParameters, StateBytes, ZeroSettings, local_parameters
from megagpt.plan.states import state_bytes

if TYPE_CHECKING:
    from megagpt.config.deepspeed import Layout, Resolved
    from megagpt.config.recipe import ModelSection

PROCESS_BYTES = 4 << 30
"""Host memory of a rank for Python, torch, CUDA and pages of the corpus, which are not counted one by one.

In BigScience's runs on A100 it was 3 to 5 GB (bigscience-workshop/bigscience, tr11).
"""


@dataclass(frozen=True)
class Memory:
    """Memory of the fullest rank, in bytes, at its peak. Memory on the host and on NVMe is counted separately."""

    weights: int
    gradients: int
    optimizer: int
    """size of the fp32 weights and moments"""
    buffers: int
    """size of communication buffers, gathered weights, and copies during the optimizer step"""
    activations: int
    loss: int
    """size of the logits of a chunk, and of the gradients that the loss computes in its forward pass"""
    moment: str
    """name of the moment at which the memory peaks"""
    stage: int
    """pipeline stage of the rank"""
    host: int
    pinned: int
    nvme: int

    @property
    def device(self) -> int:
        """Total memory on the device, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations + self.loss


def memory(resolved: Resolved, on_cpu: bool = False) -> Memory:
    """Return the memory of the rank that needs the most.

    Args:
        resolved: the recipe, config and layout of the run.
        on_cpu: whether the run uses CPUs, so that the device is the host itself.
    """
    moments = [
        moment for stage in range(resolved.layout.pipeline_stages) for moment in _moments(resolved, stage, on_cpu)
    ]
    return max(moments, key=lambda moment: moment.device)


def _moments(resolved: Resolved, stage: int, on_cpu: bool) -> list[Memory]:
    """Return the memory of a rank of a pipeline stage at each moment that can be its peak."""
    layout, section = resolved.layout, resolved.recipe.model
    zero = ZeroSettings(resolved)
    local = local_parameters(section, layout, stage)
    state = state_bytes(zero, local)
    shape = MicroBatchShape.of(section, layout, zero.element)
    saved, host = _saved_activations(section, layout, shape, local, stage)
    is_last = stage == layout.pipeline_stages - 1
    loss = activations.loss_gradients(shape) + activations.loss_workspace(shape, on_cpu) if is_last else 0
    block = activations.block(shape)
    workspace = activations.backward_workspace(shape)
    recomputation = block - shape.hidden if layout.recomputed_blocks else 0
    process = 0 if on_cpu else PROCESS_BYTES + _initialization(zero, local)

    def at(moment: str, *, gradients: int, buffers: int, active: int = 0, logits: int = 0) -> Memory:
        return Memory(
            weights=state.weights, gradients=gradients, optimizer=state.optimizer, buffers=buffers, activations=active,
            loss=logits, moment=moment, stage=stage, host=state.host + host + process, pinned=state.pinned,
            nvme=state.nvme,
        )  # fmt: skip

    return [
        at("the loss", gradients=state.kept_gradients, buffers=state.buffers, active=saved, logits=loss),
        at(
            "the first block's backward pass", gradients=_early_gradients(state, zero, local), buffers=state.buffers,
            active=saved + workspace + recomputation,
        ),
        at(
            "the last block's backward pass", gradients=state.gradients, buffers=state.buffers,
            active=block + workspace,
        ),
        at("the optimizer step", gradients=state.gradients, buffers=state.step),
        at("Muon's update of the matrices", gradients=0, buffers=state.matrices),
    ]  # fmt: skip


def _early_gradients(state: StateBytes, zero: ZeroSettings, local: LocalParameters) -> int:
    """Return the bytes of the gradients that exist when the backward pass reaches the blocks, after the head."""
    head = local.layers[-1] * zero.element
    return min(state.gradients, max(state.kept_gradients, head))


def _saved_activations(
    section: ModelSection, layout: Layout, shape: MicroBatchShape, local: LocalParameters, stage: int
) -> tuple[int, int]:
    """Return the bytes of the activations of all micro-batches in flight, on the device and on the host.

    In a pipeline of p stages, a stage holds min(p - stage, m) of m micro-batches, each with the output of the stage
    (the 1F1B schedule in DeepSpeed's runtime/pipe/schedule.py). The gradient that the stage receives is added.
    """
    blocks = len({name.split(".")[1] for name in local.shapes if name.endswith(".attention.qkv.weight")})
    recomputed = -(-blocks * layout.recomputed_blocks // section.n_layer)
    inputs = recomputed * activations.recomputed_block(shape)
    saved = (blocks - recomputed) * activations.block(shape) + (0 if layout.activations_on_host else inputs)
    is_last = stage == layout.pipeline_stages - 1
    in_flight = min(layout.pipeline_stages - stage, layout.accumulation)
    boundary = shape.hidden if layout.pipeline_stages > 1 else 0
    per_micro_batch = saved + (activations.final_norm(shape) if is_last else boundary)
    return in_flight * per_micro_batch + boundary, in_flight * inputs if layout.activations_on_host else 0


def _initialization(zero: ZeroSettings, local: LocalParameters) -> int:
    """Return the host memory of the initial fp32 weights, in bytes.

    With tensor or pipeline parallelism, a rank creates its whole shard at once. Otherwise it creates one parameter at
    a time.
    """
    is_split = zero.layout.tensor_parallel > 1 or zero.layout.pipeline_stages > 1
    return FP32_BYTES * (local.total if is_split else local.largest)
