"""`megagpt plan`: what a run will take, and whether it fits, before anything is built; no torch, no DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megagpt.config import deepspeed as ds_config
from megagpt.config import recipe as recipes
from megagpt.config.deepspeed import Resolved
from megagpt.config.deepspeed.known_keys import recorded_keys, version_note
from megagpt.errors import UserError
from megagpt.model import flops
from megagpt.plan import changes, cost_estimate, machine, table
from megagpt.plan import search as searching
from megagpt.plan.memory import Memory, memory
from megagpt.plan.search import Search
from megagpt.plan.states import Zero
from megagpt.plan.verdict import Fit, fit


@dataclass(frozen=True)
class Options:
    """What a plan is made for. `device` is a name or a size, `host_memory` bytes of each node."""

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
    """All that can be said beforehand: bytes, seconds, FLOPs. `changes` are words that make it fit."""

    parameters: int
    world_size: int
    nodes: int
    zero_stage: int
    data_parallel: int
    parts: str
    """how the model is split (`Layout.parallelism`); "" if it is not"""
    micro_batch: int
    accumulation: int
    global_batch: int
    recomputed: float
    """share of the blocks"""
    waits: float
    """share of the time in which a pipeline's stages wait"""
    offloads: bool
    memory: Memory
    fit: Fit
    length: cost_estimate.Length
    time: cost_estimate.Time | None
    traffic: cost_estimate.Traffic
    disk: cost_estimate.Disk
    changes: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return table.text(self)


def plan(options: Options) -> Plan:
    """Work out a run. Raises UserError where recipe, config or machine cannot be."""
    world, nodes = _machines(options)
    device = None if options.device is None else machine.device(options.device)
    host = None if options.host_memory is None else machine.device(options.host_memory).memory
    recipe = recipes.load(options.recipe, options.overrides)

    def resolve(more: tuple[str, ...] = ()) -> Resolved:
        words = (*options.overrides, *more)
        return ds_config.load(options.deepspeed_config, recipe, world, recorded_keys(), words)

    def fits(resolved: Resolved) -> Fit:
        return fit(memory(resolved), device, -(-world // nodes), host)

    resolved = resolve()
    found, layout = fits(resolved), resolved.layout
    wanted = changes.nearest(resolved, resolve, lambda one: fits(one).good) if found.bad else ()
    length = cost_estimate.length(resolved)
    notes = [*resolved.notes, *([note] if (note := version_note()) else [])]
    if device is not None and Zero(resolved).offloads:
        notes.append("no time is told: what is offloaded waits for the host, and no published run tells how long")
    if resolved.recipe.model.dropout:
        notes.append("dropout's masks are not counted")
    return Plan(
        parameters=flops.parameters(resolved.recipe.model),
        world_size=world, nodes=nodes, zero_stage=layout.zero_stage, data_parallel=layout.data_parallel,
        parts=layout.parallelism, micro_batch=layout.micro_batch, accumulation=layout.accumulation,
        global_batch=resolved.recipe.batch.global_size,
        recomputed=layout.recomputed_blocks / resolved.recipe.model.n_layer, waits=layout.pipeline_bubble,
        offloads=Zero(resolved).offloads,
        memory=memory(resolved), fit=found, length=length,
        time=None if device is None else cost_estimate.time(resolved, length.flops, device.name),
        traffic=cost_estimate.traffic(resolved), disk=cost_estimate.disk(resolved, length.tokens), changes=wanted,
        notes=tuple(notes),
    )  # fmt: skip


def search(options: Options) -> Search:
    """Plan every DeepSpeed config of a folder, `options.deepspeed_config`; see `Search`."""
    return searching.search(options, plan)


def _machines(options: Options) -> tuple[int, int]:
    """The ranks, and the nodes that share them."""
    nodes, each, world = options.nodes, options.ranks_per_node, options.world_size
    if world is None:
        return (nodes or 1) * (each or 1), nodes or 1
    if nodes is not None and each is not None and nodes * each != world:
        rows = f"--world-size {world}\n--nodes {nodes} --gpus-per-node {each}"
        raise UserError("two ways of saying how many ranks there are disagree", rows, "keep one of them")
    return world, nodes or -(-world // (each or world))


__all__ = ["Options", "Plan", "Search", "plan", "search"]
