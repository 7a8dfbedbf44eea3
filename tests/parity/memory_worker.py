"""One rank that saves a larger model, or measures the memory of building or loading it. Started by groups.py.

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
from megagpt.engine.init_model import init_model
from megagpt.files import folder_writer
from megagpt.model.parallel import WHOLE
from tests.parity import layouts
from tests.parity.state_worker import data

DEEPER = ("model.d_model=384", "model.n_layer=16", "model.vocab_size=512")
LARGER = ("model.d_model=384", "model.n_layer=4", "model.vocab_size=8192")


def main(job: dict[str, Any]) -> None:
    """Run the job, and write the measured bytes to FOLDER/memory-RANK.json."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(job["seconds"], exit=True)
    rank, folder = from_environment(os.environ), Path(job["folder"])
    start(rank)
    answer = build_model(job["build"], folder, rank) if "build" in job else move(job, folder, rank)
    (folder / f"memory-{rank.rank}.json").write_text(json.dumps(answer))
    faulthandler.cancel_dump_traceback_later()
    stop()


def build_model(id: str, folder: Path, rank: Rank) -> dict[str, int]:
    """Measure the memory of the model with its initial values."""
    resolved, before = resolve(id, DEEPER, folder), anonymous()
    return {"built": peak(lambda: init_model(resolved.recipe, resolved.config, 3, WHOLE)) - before}


def move(job: dict[str, Any], folder: Path, rank: Rank) -> dict[str, int]:
    """After two updates, save to FOLDER/saved or load it. Returns the peak memory of training and loading."""
    resolved = resolve(job.get("save", job.get("load")), LARGER, folder)
    engine: Any = build(resolved, 100, rank, Collectives(rank.world_size))
    engine.train_update(data(resolved, rank, 0))  # allocates the moments
    answer = {"trained": peak(lambda: engine.train_update(data(resolved, rank, 1)))}
    if "save" in job:
        engine.save_state(folder_writer(folder / "saved"))
    else:
        answer["loaded"] = peak(lambda: engine.load_state(folder / "saved"))
    engine.release()
    return answer


def resolve(id: str, overrides: tuple[str, ...], folder: Path) -> Resolved:
    """Resolve a case with other recipe overrides."""
    (case,) = (one for one in layouts.CASES if one.id == id)
    return layouts.resolve(replace(case, recipe=overrides), folder)


def peak(work: Callable[[], object]) -> int:
    """Return the peak anonymous memory of this process during `work`, in bytes. Mapped files do not count."""
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
    """Return the anonymous memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon")
