"""Every DeepSpeed config of a folder planned for the same recipe and machines: which of them fit, and in what order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.plan import Options, Plan

_AGAIN = 1 / 3  # of the model's arithmetic: a forward pass beside a forward and a backward one


@dataclass(frozen=True)
class Choice:
    """A config that fits, with the words that it needs for that, and what decides on its place."""

    config: str
    words: str
    zero_stage: int
    parts: str
    micro_batch: int
    accumulation: int
    device_share: float
    offloads: bool
    recomputed: float
    """share of the blocks"""
    waits: float
    """share of the time in which pipeline stages wait"""
    sent: int
    """bytes that a rank sends in an update"""

    @property
    def order(self) -> tuple[bool, float, int]:
        """Nothing on the host first; then the least arithmetic and waiting; then the fewest bytes sent."""
        return self.offloads, round((1 + _AGAIN * self.recomputed) / (1 - self.waits), 3), self.sent


@dataclass(frozen=True)
class Search:
    """The choices, the best first, and why each other config is none, by its name."""

    world_size: int
    device: str
    choices: tuple[Choice, ...]
    others: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, (*(one.config for one in self.choices), *self.others)))
        lines = [f"{len(self.choices)} configs fit {self.world_size} × {self.device}; the best first:"]
        head = f"  {'':<{width}}  ZeRO  micro × accumulated  memory  again  waits     sent"
        lines += [head] if self.choices else []
        for one in self.choices:
            batch = f"{one.micro_batch} × {one.accumulation}"
            lines.append(
                f"  {one.config:<{width}}  {one.zero_stage:>4}  {batch:>19}  {one.device_share:>6.0%}  "
                f"{one.recomputed:>5.0%}  {one.waits:>5.0%}  {one.sent / 1e9:>5,.0f} GB"
            )
            what = [part for part in (one.parts, "offload" if one.offloads else "") if part]
            lines += [f"  {'':<{width}}  {', '.join(what)}"] if what else []
            lines += [f"  {'':<{width}}  with {one.words}"] if one.words else []
        if self.choices:
            lines.append(
                "memory of the fullest rank; blocks computed again; time that stages wait; sent by a rank an update"
            )
        lines += [f"  {name:<{width}}  {reason}" for name, reason in self.others.items()]
        return "\n".join(lines)


def search(options: Options, plan: Callable[[Options], Plan]) -> Search:
    """Plan every .json of the folder `options.deepspeed_config`. Raises UserError where that says nothing."""
    folder = options.deepspeed_config
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(
            "there is no DeepSpeed config in this folder", str(folder), "name one with .json files, or a file"
        )
    if options.device is None:
        raise UserError(
            "what fits cannot be said without a device", str(folder), "give --device, such as H100 or 24GiB"
        )
    choices, others, world = [], {}, 0
    for file in files:
        try:
            first = plan(replace(options, deepspeed_config=file))
        except UserError as error:
            others[file.stem] = error.problems[0].what
            continue
        world, found = first.world_size, [] if first.fit.bad else [_choice(file, "", first)]
        for words in first.changes:
            changed = replace(options, deepspeed_config=file, overrides=(*options.overrides, *words.split()))
            found.append(_choice(file, words, plan(changed)))
        if found:
            choices.append(min(found, key=lambda one: one.order))
        else:
            others[file.stem] = "does not fit, and nothing near does"
    return Search(world, options.device, tuple(sorted(choices, key=lambda one: one.order)), others)


def _choice(file: Path, words: str, plan: Plan) -> Choice:
    sent, room = plan.traffic, plan.fit.device_memory or 0
    return Choice(
        file.stem, words, plan.zero_stage, plan.parts, plan.micro_batch, plan.accumulation,
        plan.fit.device_wanted / room, plan.offloads, plan.recomputed, plan.waits,
        sent.data_parallel + sent.tensor_parallel + sent.pipeline + sent.sequence_parallel,
    )  # fmt: skip
