"""A plan in words, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megagpt.plan.cost_estimate import days
from megagpt.plan.machine import SAFE

if TYPE_CHECKING:
    from megagpt.plan import Plan

_GIB = 1 << 30


def text(plan: Plan) -> str:
    """All lines."""
    return "\n".join([*_layout(plan), *_memory(plan), *_effort(plan), *_end(plan)])


def _layout(plan: Plan) -> list[str]:
    length = plan.length
    batch = f"{plan.data_parallel} × {plan.micro_batch} × {plan.accumulation}"
    cut = f"{plan.parts}, " if plan.parts else ""
    lines = [
        f"model    {plan.parameters:,} parameters",
        f"layout   {_count(plan.world_size, 'rank')} on {_count(plan.nodes, 'node')}, {cut}"
        f"ZeRO stage {plan.zero_stage}, {batch} = {plan.global_batch} samples an update",
    ]
    if length.updates is None or length.tokens is None or length.flops is None:
        return [*lines, "length   in epochs of a corpus that is not there: give length.tokens to plan its time"]
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
    where = f" of pipeline stage {memory.stage}" if memory.stage else ""
    lines = [f"memory   of the fullest rank{where} in GiB, at {memory.moment}:"]
    lines += [f"           {name:<22}{size / _GIB:10.2f}" for name, size in parts]
    total = f"           {'in all':<22}{fit.device_wanted / _GIB:10.2f}"
    if fit.device_memory is not None:
        share = fit.device_wanted / fit.device_memory
        total += f"   {share:.0%} of {fit.device_name} ({fit.device_memory / _GIB:.0f}): {fit.device}"
    lines.append(total)
    if fit.device == "too near to say":
        lines.append(f"           up to {SAFE:.0%} estimates have held; CUDA, NCCL and fragmentation come on top")
    host = f"host     {fit.host_wanted / _GIB:.1f} GiB a node"
    if memory.pinned:
        host += f", of which pinned {plan.world_size // plan.nodes * memory.pinned / _GIB:.1f}"
    if fit.host_memory is not None:
        host += f"; {fit.host_memory / _GIB:.0f} are there: {fit.host}"
    lines.append(host)
    if memory.nvme:
        lines.append(f"NVMe     {plan.world_size // plan.nodes * memory.nvme / _GIB:.1f} GiB a node")
    return lines


def _effort(plan: Plan) -> list[str]:
    disk, sent, lines = plan.disk, plan.traffic, []
    kept = "more with every save" if disk.checkpoints is None else f"{disk.checkpoints / 1e9:,.1f} for all at once"
    read = "" if disk.corpus is None else f"; {disk.corpus / 1e9:,.1f} of corpus, if each token is read once"
    lines.append(f"disk     {disk.checkpoint / 1e9:,.1f} GB a checkpoint, {kept}{read}")
    ways = (
        ("data-parallel", sent.data_parallel), ("tensor parts", sent.tensor_parallel), ("stages", sent.pipeline),
        ("sequence parts", sent.sequence_parallel),
    )  # fmt: skip
    used = ", ".join(f"{size / 1e9:,.2f} {way}" for way, size in ways if size)
    lines.append(f"network  {used or 'none'}{' GB that each rank sends an update' if used else ''}")
    if plan.time is not None:
        time, (low, high) = plan.time, plan.time.device_hours
        shares = f"{time.utilisation[0]:.0%} to {time.utilisation[1]:.0%} of peak"
        lines.append(f"time     {days(time.shortest)} to {days(time.longest)}, {low:,.0f} to {high:,.0f} device-hours,")
        lines.append(f"         at {shares}, as reached by {time.source}")
    if plan.waits:
        lines.append(f"waiting  {plan.waits:.0%} of the time by each pipeline stage")
    return lines


def _end(plan: Plan) -> list[str]:
    lines = [f"note     {note}" for note in plan.notes]
    if plan.fit.bad:
        lines += (
            ["add one of these lines to the command, and it fits:"] if plan.changes else ["nothing near makes it fit"]
        )
        lines += [f"  {words}" for words in plan.changes]
    return lines
