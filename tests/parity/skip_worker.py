"""One rank that trains layouts, with and without bad updates among the good ones. Started by groups.py.

The job: {"folder", "seconds", "cases": [ids]}; writes ID.json of each case
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megagpt.cluster import Collectives, Rank, from_environment
from megagpt.engine.build import build
from megagpt.engine.init_deepspeed import start, stop
from megagpt.engine.state import loss_scale
from megagpt.files import folder_writer
from megagpt.model.attention import Attention
from megagpt.model.layers import Head
from tests.parity import layouts, needs

GOOD, SAVED = range(4), 2  # updates, and the number of them after which the state is saved
BAD = {"a refused loss": 50, "a loss that is NaN on one rank": 51, "a gradient that is infinite on one rank": 52}


class Calls:
    """Records the callbacks that an engine calls during an update, in order."""

    def __init__(self, refuse: bool) -> None:
        self._refuse, self._losses, self._order = refuse, [], []

    def accept(self, loss: float) -> bool:
        """Reject every loss if `refuse` is set, otherwise only losses that are not finite."""
        self._losses.append(loss)
        self._order.append("accept")
        return not self._refuse and math.isfinite(loss)

    def at_step(self) -> None:
        """Record that the optimizer step begins."""
        self._order.append("step")

    def on_all_ranks(self, loss: float, collectives: Collectives) -> list[dict[str, Any]]:
        """Return the calls of each rank, and the loss in its result. Collective."""
        mine = {"order": self._order, "losses": list(map(repr, self._losses)), "loss": repr(loss)}
        return collectives.all_gather_object(mine)


class Planted:
    """Corrupts the output of one kind of layer on the last rank: its value, or only its gradient.

    The layer is attention, or the head if the last pipeline stage has no block.
    """

    def __init__(self, last: bool) -> None:
        self.bad, self._last, self._layer = "", last, Attention
        for layer in (Attention, Head):
            layer.forward = self._spoiling(layer, layer.forward)

    def choose_layer(self, engine: Any) -> None:
        """Corrupt the output of a kind of layer that this rank has."""
        layers = engine._engine.module.modules()
        self._layer = Attention if any(isinstance(layer, Attention) for layer in layers) else Head

    def _spoiling(self, layer: type, real: Any) -> Any:
        def forward(module: Any, *arguments: Any, **options: Any) -> Any:
            x = real(module, *arguments, **options)
            if not self._last or layer is not self._layer:
                return x
            if "loss" in self.bad:
                return x * math.nan
            if "gradient" in self.bad and x.requires_grad:
                x.register_hook(lambda gradient: gradient * math.inf)
            return x

        return forward


def main(job: dict[str, Any]) -> None:
    """Run the cases in order."""
    torch.set_num_threads(1)
    rank = from_environment(os.environ)
    start(rank)
    collectives, planted = Collectives(rank.world_size), Planted(rank.rank == rank.world_size - 1)
    for case in layouts.CASES:
        if case.id in job["cases"]:
            faulthandler.dump_traceback_later(job["seconds"], exit=True)
            answer = run(case, Path(job["folder"]), rank, collectives, planted)
            faulthandler.cancel_dump_traceback_later()
            if rank.main:
                (Path(job["folder"]) / f"{case.id}.json").write_text(json.dumps(answer))
    stop()


def run(case: layouts.Case, folder: Path, rank: Rank, collectives: Collectives, planted: Planted) -> dict[str, Any]:
    """Test one layout, and return the results."""
    needs.provide(case)
    dropout = replace(case, recipe=(*case.recipe, "model.dropout=0.1"))
    resolved = layouts.resolve(dropout, folder)
    saved = folder / f"{case.id}-saved"
    if rank.main:
        saved.mkdir()
    collectives.barrier()

    def update(engine: Any, number: int, **callbacks: Any) -> Any:
        samples = layouts.samples(resolved.recipe, layouts.GLOBAL_BATCH, number * layouts.GLOBAL_BATCH)
        return engine.train_update(layouts.share(samples, resolved.layout, rank), **callbacks)

    engine: Any = build(resolved, 100, rank, collectives)
    straight = []
    for number in GOOD:
        if number == SAVED:
            engine.save_state(folder_writer(saved))
        straight.append(update(engine, number))
    weights = {name: value.clone() for name, value in engine.weights()}
    false_alarms = engine.replicas_differ()
    spoil(engine)
    broken = update(engine, 9)
    engine.load_state(saved)
    healed = [update(engine, number) for number in GOOD[SAVED:]]
    engine.release()

    engine = build(resolved, 100, rank, collectives)
    planted.choose_layer(engine)
    good, bad, reported = [], {}, {}
    for number, (kind, position) in zip(GOOD, (*BAD.items(), ("", 0)), strict=True):
        good.append(update(engine, number))
        if kind:
            planted.bad = "" if "refused" in kind else kind
            calls = Calls(refuse="refused" in kind)
            result = update(engine, position, accept=calls.accept, at_step=calls.at_step)
            bad[kind] = result.made
            reported[kind] = calls.on_all_ranks(result.loss, collectives)
            planted.bad = ""
    same = all(torch.equal(value, weights[name]) for name, value in engine.weights())
    scale = loss_scale.state_dict(engine._engine.optimizer)
    flipped = flip(engine, rank, resolved)
    answer = {
        "made": bad,
        "reported": reported,
        "same results": good == straight,
        "same weights": same,
        "hysteresis": scale.get("cur_hysteresis"),
        "broken": broken.made,
        "healed": healed == straight[SAVED:],
        "false alarms": false_alarms,
        "flipped": flipped,
        "differ": engine.replicas_differ(),
    }
    engine.release()
    if "precision=fp16" in case.recipe:
        answer |= overflowing(dropout, folder, straight, update, rank, collectives)
    return answer


def overflowing(
    case: layouts.Case, folder: Path, straight: list[Any], update: Any, rank: Rank, collectives: Collectives
) -> dict[str, Any]:
    """Train with an initial loss scale at which gradients overflow, and repeat each update until it is made."""
    config = {**case.config, "fp16": {"initial_scale_power": 30}}
    engine: Any = build(layouts.resolve(replace(case, config=config), folder), 100, rank, collectives)
    attempts = []
    for number in GOOD:
        while True:
            attempts.append(update(engine, number))
            if attempts[-1].made:
                break
    engine.release()
    made = [attempt for attempt in attempts if attempt.made]
    return {
        "overflows": len(attempts) - len(made),
        "off": max(abs(one.loss - other.loss) / other.loss for one, other in zip(made, straight, strict=True)),
        "rates": [one.lr for one in made] == [one.lr for one in straight],
    }


def spoil(engine: Any) -> None:
    """Make every weight NaN, both master weights and low-precision copies, by an optimizer step."""
    groups = engine._engine.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = math.nan
    engine._empty_update()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def flip(engine: Any, rank: Rank, resolved: Any) -> str:
    """Flip one bit of a replicated weight on the last rank. Returns the weight's name on every rank."""
    cut = ("qkv", "output", "up", "gate", "down") if resolved.layout.tensor_parallel > 1 else ()
    names = engine._names()
    if resolved.layout.pipeline_stages > 1:
        name = "layers.0.weight"
    else:
        name = [name for name in names.values() if not any(part in name for part in cut)][-2]
    if resolved.layout.zero_stage == 3:
        return ""
    for parameter, other in names.items():
        if other == name and rank.rank == rank.world_size - 1:
            width = torch.int32 if parameter.element_size() == 4 else torch.int16
            parameter.data.view(-1)[:1].view(width).bitwise_xor_(1)
    return name
