"""One rank that trains layouts and saves them, or goes on from what other layouts saved. Started by groups.py.

move_worker.py JOB.json      JOB: {"folder", "seconds", "after", "save": [case], "load": [[case, case]]}
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

import layouts
import torch
from safetensors.torch import save_file
from state_worker import data

from megagpt.distributed import Agreement, Rank, from_environment
from megagpt.engine.build import build
from megagpt.engine.start import start, stop
from megagpt.files import into

RECIPE = ("model.n_layer=4", "optimizer.lr=1.0e-3", "optimizer.clip=1.5")  # clips in some updates, not in all
BEFORE, TOTAL = 4, 100  # updates


def main(job: dict[str, Any]) -> None:
    """Save, then load."""
    torch.set_num_threads(1)
    rank = from_environment(os.environ)
    start(rank)
    agreement, folder = Agreement(rank.world_size), Path(job["folder"])
    for source in job["save"]:
        faulthandler.dump_traceback_later(job["seconds"], exit=True)
        save(case(source), folder, rank, agreement)
    for source, target in job["load"]:
        faulthandler.dump_traceback_later(job["seconds"], exit=True)
        load(source, case(target), folder, rank, agreement, job["after"])
    faulthandler.cancel_dump_traceback_later()
    stop()


def case(name: str) -> layouts.Case:
    """The layout of this name with the recipe of this test."""
    (found,) = (one for one in layouts.CASES if one.id == name)
    return replace(found, recipe=RECIPE)


def save(source: layouts.Case, folder: Path, rank: Rank, agreement: Agreement) -> None:
    """Train a few updates, and save into FOLDER/ID."""
    resolved = layouts.resolve(source, folder)
    engine: Any = build(resolved, TOTAL, rank, agreement)
    for update in range(BEFORE):
        engine.train_update(data(resolved, rank, update))
    engine.save_state(into(folder / source.id))
    engine.release()
    del engine
    gc.collect()


def load(source: str, target: layouts.Case, folder: Path, rank: Rank, agreement: Agreement, after: int) -> None:
    """Go on from what `source` saved; write what the updates did, and the weights."""
    resolved = layouts.resolve(target, folder)
    engine: Any = build(resolved, TOTAL, rank, agreement)
    engine.load_state(folder / source)
    results = [engine.train_update(data(resolved, rank, update)) for update in range(BEFORE, BEFORE + after)]
    weights = dict(engine.weights())
    if rank.main:
        save_file(weights, folder / f"{source}-to-{target.id}.weights")
        (folder / f"{source}-to-{target.id}.json").write_text(json.dumps([asdict(result) for result in results]))
    engine.release()
    del engine
    gc.collect()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
