"""One rank that saves a larger model, or measures what memory building or moving it takes. Started by groups.py.

The job: {"folder", "seconds", and one of "save", "load", "build": case id}
"""

from __future__ import annotations

import faulthandler
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megagpt.cluster import Collectives, Rank, from_environment
from megagpt.config.deepspeed import Resolved
from megagpt.engine.build import build
from megagpt.engine.init_deepspeed import start, stop
from megagpt.engine.init_model import materialise
from megagpt.files import folder_writer
from tests.parity import layouts
from tests.parity.state_worker import data

DEEPER = ("model.d_model=384", "model.n_layer=16", "model.vocab_size=512")
LARGER = ("model.d_model=384", "model.n_layer=4", "model.vocab_size=8192")


def main(job: dict[str, Any]) -> None:
    """Do the job; bytes per rank go into FOLDER/memory-RANK.json."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(job["seconds"], exit=True)
    rank, folder = from_environment(os.environ), Path(job["folder"])
    start(rank)
    answer = build_model(job["build"], folder, rank) if "build" in job else move(job, folder, rank)
    (folder / f"memory-{rank.rank}.json").write_text(json.dumps(answer))
    faulthandler.cancel_dump_traceback_later()
    stop()


def build_model(id: str, folder: Path, rank: Rank) -> dict[str, int]:
    """What the model with its initial values takes."""
    resolved, before = resolve(id, DEEPER, folder), anonymous()
    return {"built": peak(lambda: materialise(resolved.recipe, resolved.config, 3)) - before}


def move(job: dict[str, Any], folder: Path, rank: Rank) -> dict[str, int]:
    """Save into FOLDER/saved after two updates, or load it then; what training and loading take."""
    resolved = resolve(job.get("save", job.get("load")), LARGER, folder)
    engine: Any = build(resolved, 100, rank, Collectives(rank.world_size))
    engine.train_update(data(resolved, rank, 0))  # makes the moments
    answer = {"trained": peak(lambda: engine.train_update(data(resolved, rank, 1)))}
    if "save" in job:
        engine.save_state(folder_writer(folder / "saved"))
    else:
        answer["loaded"] = peak(lambda: engine.load_state(folder / "saved"))
    engine.release()
    return answer


def resolve(id: str, words: tuple[str, ...], folder: Path) -> Resolved:
    """The layout of this name with changes to the recipe."""
    (case,) = (one for one in layouts.CASES if one.id == id)
    return layouts.resolve(replace(case, recipe=words), folder)


def peak(work: Callable[[], object]) -> int:
    """The most memory of its own, in bytes, that this process has had during `work`; mapped files do not count."""
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return most


def anonymous() -> int:
    """Bytes of memory that belongs to this process alone."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status says no RssAnon")
