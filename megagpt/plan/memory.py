"""The memory of the fullest rank, by part and moment, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megagpt.plan import activations, states
from megagpt.plan.activations import Shape
from megagpt.plan.states import Held, States, Zero

if TYPE_CHECKING:
    from megagpt.config.deepspeed import Layout, Resolved
    from megagpt.config.recipe import ModelSection

PROCESS = 4 << 30
"""Host memory of a rank beside what is counted: Python, torch, CUDA, pages of the corpus; 3 to 5 GB in BigScience's
runs on A100 (bigscience-workshop/bigscience, tr11)"""


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank, at the moment when it holds most; those on the host and NVMe beside."""

    weights: int
    gradients: int
    optimizer: int
    """fp32 weights and moments"""
    buffers: int
    """communication, gathered weights, copies while the optimizer steps"""
    activations: int
    loss: int
    """logits of a chunk, and the gradients that the loss makes at once"""
    moment: str
    stage: int
    """pipeline stage of the rank"""
    host: int
    pinned: int
    nvme: int

    @property
    def device(self) -> int:
        """All on the device."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations + self.loss


def memory(resolved: Resolved, on_cpu: bool = False) -> Memory:
    """The memory of the rank that holds most. With `on_cpu` the device is the host itself."""
    return max(
        (one for stage in range(resolved.layout.pipeline_stages) for one in _moments(resolved, stage, on_cpu)),
        key=lambda one: one.device,
    )


def _moments(resolved: Resolved, stage: int, on_cpu: bool) -> list[Memory]:
    """One stage at the end of the forward pass, at that of the backward pass, and in the step."""
    layout, section = resolved.layout, resolved.recipe.model
    zero = Zero(resolved)
    mine = states.held(section, layout, stage)
    sizes = states.states(zero, mine)
    shape = Shape.of(section, layout, zero.element)
    kept, host = _kept(section, layout, shape, mine, stage)
    last = stage == layout.pipeline_stages - 1
    loss = activations.head_kept(shape) if last else 0
    passing = activations.head_passing(shape, on_cpu) if last else 0
    one = activations.block(shape)
    work = activations.working(shape) + (one - shape.hidden if layout.recomputed_blocks else 0)

    def at(moment: str, gradients: int, buffers: int, active: int, logits: int) -> Memory:
        return Memory(
            sizes.weights, gradients, sizes.optimizer, buffers, active, logits, moment, stage,
            sizes.host + host + (0 if on_cpu else PROCESS + _built(zero, mine)), sizes.pinned, sizes.nvme,
        )  # fmt: skip

    return [
        at("the loss", sizes.kept_gradients, sizes.buffers, kept, loss + passing),
        at("the first block's backward pass", _under_way(sizes, zero, mine), sizes.buffers, kept + work, 0),
        at("the last block's backward pass", sizes.gradients, sizes.buffers, one + activations.working(shape), 0),
        at("the step", sizes.gradients, sizes.step, 0, 0),
        at("the step of Muon's matrices", 0, sizes.matrices, 0, 0),
    ]


def _under_way(sizes: States, zero: Zero, mine: Held) -> int:
    """Gradients when the backward pass begins with the blocks: those kept, and that of the head."""
    head = mine.layers[-1] * zero.element
    return min(sizes.gradients, max(sizes.kept_gradients, head))


def _kept(section: ModelSection, layout: Layout, shape: Shape, mine: Held, stage: int) -> tuple[int, int]:
    """Activations of all micro-batches in flight on the device, and on the host.

    A pipeline of p stages holds min(p - stage, m) micro-batches (1F1B, DeepSpeed's runtime/pipe/schedule.py), each with
    what the stage gives on; and what it is given back.
    """
    blocks = len({name.split(".")[1] for name in mine.shapes if name.endswith(".attention.qkv.weight")})
    again = -(-blocks * layout.recomputed_blocks // section.n_layer)
    starts = again * activations.recomputed_block(shape)
    kept = (blocks - again) * activations.block(shape) + (0 if layout.activations_on_host else starts)
    last = stage == layout.pipeline_stages - 1
    flight = min(layout.pipeline_stages - stage, layout.accumulation)
    given = shape.hidden if layout.pipeline_stages > 1 else 0
    each = kept + (activations.final_norm(shape) if last else given)
    return flight * each + given, flight * starts if layout.activations_on_host else 0


def _built(zero: Zero, mine: Held) -> int:
    """What building takes of the host before training: a share of the model in fp32 where ranks cut it themselves."""
    cut = zero.layout.tensor_parallel > 1 or zero.layout.pipeline_stages > 1
    return 4 * (mine.total if cut else mine.largest)
