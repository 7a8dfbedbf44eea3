"""Options and result of `megagpt plan`, and the text of a plan for a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megagpt.plan.cost_estimate import Disk, Length, Time, Traffic, format_duration
from megagpt.plan.machine import SAFE_FRACTION
from megagpt.plan.memory import Memory
from megagpt.plan.verdict import TOO_CLOSE, Fit

_GIB = 1 << 30


@dataclass(frozen=True)
class PlanOptions:
    """Options of `megagpt plan`. `device` is a name or a memory size, and `host_memory` is a memory size per node."""

    recipe: Path
    deepspeed_config: Path
    overrides: tuple[str, ...] = ()
    world_size: int | None = None
    nodes: int | None = None
    ranks_per_node: int | None = None
    device: str | None = None
    host_memory: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that can be computed before a run, in bytes, seconds and FLOPs.

    If the run does not fit, each entry of `changes` is an alternative set of overrides with which it does.
    """

    parameters: int
    world_size: int
    nodes: int
    zero_stage: int
    data_parallel: int
    parallelism: str
    """description of pipeline, tensor and sequence parallelism; "" if there is none"""
    micro_batch: int
    accumulation: int
    global_batch: int
    recomputed_fraction: float
    """fraction of the blocks that are recomputed"""
    bubble_fraction: float
    """fraction of the time in which a pipeline stage is idle"""
    offloads: bool
    memory: Memory
    fit: Fit
    length: Length
    time: Time | None
    traffic: Traffic
    disk: Disk
    changes: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*_layout(self), *_memory(self), *_cost(self), *_notes_and_changes(self)])


def _layout(plan: Plan) -> list[str]:
    length = plan.length
    batch = f"{plan.data_parallel} × {plan.micro_batch} × {plan.accumulation}"
    parallelism = f"{plan.parallelism}, " if plan.parallelism else ""
    lines = [
        f"model    {plan.parameters:,} parameters",
        f"layout   {_count(plan.world_size, 'rank')} on {_count(plan.nodes, 'node')}, {parallelism}"
        f"ZeRO stage {plan.zero_stage}, {batch} = {plan.global_batch} samples per update",
    ]
    if length.updates is None or length.tokens is None or length.flops is None:
        return [*lines, "length   unknown: it is given in epochs of a corpus that does not exist; set length.tokens"]
    per_update = f"{length.updates:,} updates of {length.tokens_per_update:,} tokens"
    return [*lines, f"length   {per_update}: {length.tokens:,} tokens, {length.flops:.2e} FLOPs"]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _memory(plan: Plan) -> list[str]:
    memory, fit = plan.memory, plan.fit
    parts = (
        ("weights", memory.weights), ("gradients", memory.gradients), ("fp32 weights, moments", memory.optimizer),
        ("buffers", memory.buffers), ("activations", memory.activations), ("logits and loss", memory.loss),
    )  # fmt: skip
    stage = f" (pipeline stage {memory.stage})" if memory.stage else ""
    lines = [f"memory   GiB on the fullest rank{stage}, at its peak: {memory.moment}"]
    lines += [f"           {name:<22}{size / _GIB:10.2f}" for name, size in parts]
    total = f"           {'total':<22}{fit.device_wanted / _GIB:10.2f}"
    if fit.device_memory is not None:
        fraction = fit.device_wanted / fit.device_memory
        total += f"   {fraction:.0%} of {fit.device_name} ({fit.device_memory / _GIB:.0f}): {fit.device}"
    lines.append(total)
    if fit.device == TOO_CLOSE:
        lines.append(
            f"           estimates up to {SAFE_FRACTION:.0%} are safe; CUDA, NCCL and fragmentation need memory, too"
        )
    ranks_per_node = plan.world_size // plan.nodes
    host = f"host     {fit.host_wanted / _GIB:.1f} GiB per node"
    if memory.pinned:
        host += f", of which {ranks_per_node * memory.pinned / _GIB:.1f} pinned"
    if fit.host_memory is not None:
        host += f"; {fit.host_memory / _GIB:.0f} available: {fit.host}"
    lines.append(host)
    if memory.nvme:
        lines.append(f"NVMe     {ranks_per_node * memory.nvme / _GIB:.1f} GiB per node")
    return lines


def _cost(plan: Plan) -> list[str]:
    disk, lines = plan.disk, []
    kept = "growing with every save" if disk.checkpoints is None else f"{disk.checkpoints / 1e9:,.1f} GB for all kept"
    corpus = "" if disk.corpus is None else f"; {disk.corpus / 1e9:,.1f} GB of corpus if each token is read once"
    lines.append(f"disk     {disk.checkpoint / 1e9:,.1f} GB per checkpoint, {kept}{corpus}")
    kinds = (
        ("data-parallel", plan.traffic.data_parallel), ("tensor-parallel", plan.traffic.tensor_parallel),
        ("pipeline", plan.traffic.pipeline), ("sequence-parallel", plan.traffic.sequence_parallel),
    )  # fmt: skip
    sent = ", ".join(f"{size / 1e9:,.2f} GB {kind}" for kind, size in kinds if size)
    lines.append(f"network  {sent} sent per rank per update" if sent else "network  none")
    if plan.time is not None:
        time = plan.time
        low, high = time.device_hours
        fastest, slowest = format_duration(time.shortest), format_duration(time.longest)
        lines.append(f"time     {fastest} to {slowest}, {low:,.0f} to {high:,.0f} device-hours,")
        lines.append(
            f"         at {time.utilization[0]:.0%} to {time.utilization[1]:.0%} of peak, as reached by {time.source}"
        )
    if plan.bubble_fraction:
        lines.append(f"bubble   each pipeline stage is idle {plan.bubble_fraction:.0%} of the time")
    return lines


def _notes_and_changes(plan: Plan) -> list[str]:
    lines = [f"note     {note}" for note in plan.notes]
    if plan.fit.is_bad:
        if plan.changes:
            lines.append("to make it fit, add one of these lines to the command:")
        else:
            lines.append("no small change makes it fit")
        lines += [f"  {overrides}" for overrides in plan.changes]
    return lines
