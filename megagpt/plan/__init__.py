"""Implementation of `megagpt plan`, which estimates what a run takes and whether it fits.

Planning neither builds the model nor loads torch or DeepSpeed.
"""

from __future__ import annotations

from megagpt.config import deepspeed as ds_config
from megagpt.config import recipe as recipes
from megagpt.config.deepspeed import Resolved
from megagpt.config.deepspeed.known_keys import recorded_keys, version_note
from megagpt.errors import UserError
from megagpt.model import flops
from megagpt.plan import changes, cost_estimate, machine
from megagpt.plan import search as config_search
from megagpt.plan.memory import memory
from megagpt.plan.rank_state import ZeroSettings
from megagpt.plan.result import Plan, PlanOptions
from megagpt.plan.search import SearchResult
from megagpt.plan.verdict import Fit, fit


def plan(options: PlanOptions) -> Plan:
    """Return the plan of one run. Raises UserError if recipe, config or options are invalid."""
    world_size, nodes = _machines(options)
    device = None if options.device is None else machine.parse_device(options.device)
    host_memory = None
    if options.host_memory is not None:
        host_memory = machine.parse_device(options.host_memory, "--host-memory").memory
    recipe = recipes.load(options.recipe, options.overrides)

    def resolve(more: tuple[str, ...] = ()) -> Resolved:
        overrides = (*options.overrides, *more)
        return ds_config.load(options.deepspeed_config, recipe, world_size, recorded_keys(), overrides)

    def fits(resolved: Resolved) -> Fit:
        return fit(memory(resolved), device, -(-world_size // nodes), host_memory)

    resolved = resolve()
    layout, section = resolved.layout, resolved.recipe.model
    found = fits(resolved)
    length = cost_estimate.length(resolved)
    return Plan(
        parameters=flops.parameters(section),
        world_size=world_size,
        nodes=nodes,
        zero_stage=layout.zero_stage,
        data_parallel=layout.data_parallel,
        parallelism=layout.parallelism,
        micro_batch=layout.micro_batch,
        accumulation=layout.accumulation,
        global_batch=resolved.recipe.batch.global_size,
        recomputed_fraction=layout.recomputed_blocks / section.n_layer,
        bubble_fraction=layout.pipeline_bubble,
        offloads=ZeroSettings(resolved).offloads,
        memory=memory(resolved),
        fit=found,
        length=length,
        time=None if device is None else cost_estimate.time(resolved, length.flops, device.name),
        traffic=cost_estimate.traffic(resolved),
        disk=cost_estimate.disk(resolved, length.tokens),
        changes=changes.nearest(resolved, resolve, lambda other: fits(other).is_good) if found.is_bad else (),
        notes=_notes(resolved, has_device=device is not None),
    )


def search(options: PlanOptions) -> SearchResult:
    """Plan every DeepSpeed config in the folder `options.deepspeed_config`, and rank those that fit."""
    return config_search.search(options, plan)


def _notes(resolved: Resolved, *, has_device: bool) -> tuple[str, ...]:
    """Return notes about the resolved config, and about costs that the plan does not include."""
    notes = list(resolved.notes)
    note = version_note()
    if note:
        notes.append(note)
    if has_device and ZeroSettings(resolved).offloads:
        notes.append(
            "no time estimate: offloading is limited by host bandwidth, and no published run reports throughput for it"
        )
    if resolved.recipe.model.dropout:
        notes.append("dropout masks are not counted")
    return tuple(notes)


def _machines(options: PlanOptions) -> tuple[int, int]:
    """Return the number of ranks and the number of nodes."""
    nodes, ranks_per_node, world_size = options.nodes, options.ranks_per_node, options.world_size
    if world_size is None:
        return (nodes or 1) * (ranks_per_node or 1), nodes or 1
    if nodes is not None and ranks_per_node is not None and nodes * ranks_per_node != world_size:
        given = f"--world-size {world_size}\n--nodes {nodes} --gpus-per-node {ranks_per_node}"
        raise UserError("the options contradict each other on the number of ranks", given, "drop one of them")
    return world_size, nodes or -(-world_size // (ranks_per_node or world_size))


__all__ = ["Plan", "PlanOptions", "SearchResult", "plan", "search"]
