"""One rank that trains layouts and saves them, or resumes from checkpoints of other layouts. Started by groups.py.

python -m tests.parity.move_worker JOB.json
JOB: {"folder", "seconds", "after", "save": [[case, kind]], "load": [[case, case, kind]]}
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megagpt.cluster import Collectives, Rank, from_environment
from megagpt.engine.build import build
from megagpt.engine.init_deepspeed import start, stop
from megagpt.files import folder_writer
from tests.parity import layouts, needs
from tests.parity.state_worker import data

_DEEP = ("model.n_layer=4", "optimizer.lr=1.0e-3", "optimizer.clip=1.5")  # clips in some updates, not in all
RECIPES = {
    "fp32": _DEEP,
    "bf16": (*_DEEP, "precision=bf16"),
    "fp16": (*_DEEP, "precision=fp16"),
    "muon": (*_DEEP, *layouts.MUON, "optimizer.muon_lr=2.0e-3"),
}
# The loss scale doubles every nine updates. Checkpoints are saved in the middle of a window.
SCALE, WINDOW = 15, 9
_SCALING = {"fp16": {"initial_scale_power": SCALE, "loss_scale_window": WINDOW}}
BEFORE, TOTAL = 4, 108  # updates


def main(job: dict[str, Any]) -> None:
    """Run all saves of the job, then all loads."""
    torch.set_num_threads(1)
    rank = from_environment(os.environ)
    start(rank)
    collectives, folder = Collectives(rank.world_size), Path(job["folder"])
    for source, kind in job["save"]:
        faulthandler.dump_traceback_later(job["seconds"], exit=True)
        save(case(source, kind), folder / f"{source}-{kind}", rank, collectives)
    for source, target, kind in job["load"]:
        faulthandler.dump_traceback_later(job["seconds"], exit=True)
        load(folder / f"{source}-{kind}", case(target, kind), rank, collectives, job["after"][kind])
    faulthandler.cancel_dump_traceback_later()
    stop()


def case(name: str, kind: str) -> layouts.Case:
    """Return a layout by its name, with the recipe of one kind."""
    (found,) = (one for one in layouts.CASES if one.id == name)
    return replace(found, recipe=RECIPES[kind], config=found.config | (_SCALING if kind == "fp16" else {}))


def save(source: layouts.Case, folder: Path, rank: Rank, collectives: Collectives) -> None:
    """Train a few updates, and save the state to a folder."""
    needs.provide(source)
    resolved = layouts.resolve(source, folder.parent)
    engine: Any = build(resolved, TOTAL, rank, collectives)
    for update in range(BEFORE):
        engine.train_update(data(resolved, rank, update))
    engine.save_state(folder_writer(folder))
    engine.release()
    del engine
    gc.collect()


def load(saved: Path, target: layouts.Case, rank: Rank, collectives: Collectives, after: int) -> None:
    """Resume from the checkpoint of another layout, and write the results of all updates and the final weights.

    If there is no checkpoint, the layout makes the first updates itself.
    """
    needs.provide(target)
    resolved = layouts.resolve(target, saved.parent)
    engine: Any = build(resolved, TOTAL, rank, collectives)
    if saved.exists():
        engine.load_state(saved)
    else:
        for update in range(BEFORE):
            engine.train_update(data(resolved, rank, update))
    rows = []
    for update in range(BEFORE, BEFORE + after):
        scaler = getattr(engine._engine.optimizer, "loss_scaler", None)
        row = asdict(engine.train_update(data(resolved, rank, update)))
        rows.append(row | {"scale": float(scaler.cur_scale) if hasattr(scaler, "cur_scale") else 1.0})
    weights = dict(engine.weights())
    if rank.main:
        save_file(weights, saved.parent / f"{saved.name}-to-{target.id}.weights")
        (saved.parent / f"{saved.name}-to-{target.id}.json").write_text(json.dumps(rows))
    engine.release()
    del engine
    gc.collect()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
