"""Plan every DeepSpeed config in a folder for the same recipe and machines, and rank those that fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megagpt.errors import UserError
from megagpt.plan.result import Plan, PlanOptions

# Cost of a second forward pass relative to a forward and a backward pass.
_RECOMPUTATION_COST = 1 / 3


@dataclass(frozen=True)
class ConfigChoice:
    """A config that fits, the overrides with which it fits, and the values by which it is ranked."""

    config: str
    overrides: str
    zero_stage: int
    parallelism: str
    micro_batch: int
    accumulation: int
    memory_fraction: float
    offloads: bool
    recomputed_fraction: float
    """fraction of the blocks that are recomputed"""
    bubble_fraction: float
    """fraction of the time in which a pipeline stage is idle"""
    sent: int
    """number of bytes that a rank sends per update"""

    @property
    def order(self) -> tuple[bool, float, int]:
        """Sort key that prefers configs without offload, then little arithmetic and idle time, then little traffic."""
        relative_time = (1 + _RECOMPUTATION_COST * self.recomputed_fraction) / (1 - self.bubble_fraction)
        return self.offloads, round(relative_time, 3), self.sent


@dataclass(frozen=True)
class SearchResult:
    """The configs that fit, best first, and for each other config the reason why it does not fit."""

    world_size: int
    device: str
    choices: tuple[ConfigChoice, ...]
    others: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, (*(choice.config for choice in self.choices), *self.others)))
        lines = [f"{len(self.choices)} configs fit {self.world_size} × {self.device}, best first:"]
        if self.choices:
            lines.append(f"  {'':<{width}}  ZeRO  micro × accumulated  memory  recomputed  bubble     sent")
        for choice in self.choices:
            batch = f"{choice.micro_batch} × {choice.accumulation}"
            lines.append(
                f"  {choice.config:<{width}}  {choice.zero_stage:>4}  {batch:>19}  {choice.memory_fraction:>6.0%}  "
                f"{choice.recomputed_fraction:>10.0%}  {choice.bubble_fraction:>6.0%}  {choice.sent / 1e9:>5,.0f} GB"
            )
            details = [detail for detail in (choice.parallelism, "offload" if choice.offloads else "") if detail]
            if details:
                lines.append(f"  {'':<{width}}  {', '.join(details)}")
            if choice.overrides:
                lines.append(f"  {'':<{width}}  with {choice.overrides}")
        if self.choices:
            lines.append(
                "memory: of the fullest rank; recomputed: blocks; bubble: idle time of pipeline stages; "
                "sent: per rank per update"
            )
        lines += [f"  {name:<{width}}  {reason}" for name, reason in self.others.items()]
        return "\n".join(lines)


def search(options: PlanOptions, plan: Callable[[PlanOptions], Plan]) -> SearchResult:
    """Plan every .json file in a folder, and rank the configs that fit.

    Args:
        options: the options of the command, in which `deepspeed_config` is the folder.
        plan: function that plans a single config.

    Returns:
        The configs that fit, best first, and the reasons why the others do not.

    Raises:
        UserError: The folder contains no configs, or no device is given.
    """
    folder = options.deepspeed_config
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(
            "the folder contains no DeepSpeed config", str(folder), "name a folder with .json files, or one file"
        )
    if options.device is None:
        raise UserError(
            "a folder of configs can only be planned for a device", str(folder), "add --device, such as H100 or 24GiB"
        )
    choices: list[ConfigChoice] = []
    others: dict[str, str] = {}
    world_size = 0
    for file in files:
        try:
            first = plan(replace(options, deepspeed_config=file))
        except UserError as error:
            others[file.stem] = error.problems[0].what
            continue
        world_size = first.world_size
        found = [] if first.fit.is_bad else [_choice(file, "", first)]
        for overrides in first.changes:
            changed = replace(options, deepspeed_config=file, overrides=(*options.overrides, *overrides.split()))
            found.append(_choice(file, overrides, plan(changed)))
        if found:
            choices.append(min(found, key=lambda choice: choice.order))
        else:
            others[file.stem] = "does not fit, and no small change makes it fit"
    return SearchResult(
        world_size, options.device, tuple(sorted(choices, key=lambda choice: choice.order)), others
    )  # fmt: skip


def _choice(file: Path, overrides: str, plan: Plan) -> ConfigChoice:
    sent = plan.traffic
    assert plan.fit.device_memory is not None  # It is None only if no device is given, which `search` rejects.
    return ConfigChoice(
        config=file.stem,
        overrides=overrides,
        zero_stage=plan.zero_stage,
        parallelism=plan.parallelism,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        memory_fraction=plan.fit.device_wanted / plan.fit.device_memory,
        offloads=plan.offloads,
        recomputed_fraction=plan.recomputed_fraction,
        bubble_fraction=plan.bubble_fraction,
        sent=sent.data_parallel + sent.tensor_parallel + sent.pipeline + sent.sequence_parallel,
    )
