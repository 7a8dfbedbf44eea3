"""One rank of four that trains two updates of each case, and writes down what its tensors take. Started by groups.py.

The job: {"folder", "seconds", "cases": [ids]}; writes ID.json of each case

The engine and all that it allocates are real. The other ranks are not there: torch's fake process group answers for
them, with copies of what this rank sends. With real ones, gloo's threads free tensors where no one can count it.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from megagpt.cluster import Collectives, Rank
from megagpt.engine.build import build
from megagpt.engine.init_deepspeed import start
from megagpt.engine.optim.muon_all_to_all import Exchange
from tests.parity import layouts
from tests.parity.plan_cases import CASES, WORLD
from tests.parity.state_worker import data


def main(job: dict[str, Any]) -> None:
    """Run the cases in order."""
    torch.set_num_threads(1)
    rank = Rank(rank=0, world_size=WORLD)
    torch.distributed.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    start(rank)
    # the fake group gives nothing to a rank that sends nothing, as one at a border of two matrices does
    Exchange._send = lambda _, source, target, *sizes: target.zero_()  # type: ignore[method-assign]
    for case in CASES:
        if case.id in job["cases"]:
            faulthandler.dump_traceback_later(job["seconds"], exit=True)
            answer = measure(case, Path(job["folder"]), rank)
            faulthandler.cancel_dump_traceback_later()
            (Path(job["folder"]) / f"{case.id}.json").write_text(json.dumps(answer))


def measure(case: layouts.Case, folder: Path, rank: Rank) -> dict[str, int]:
    """Bytes of all tensors: the most in the second update, and what stays after it. Every allocation is seen."""
    resolved = layouts.resolve(case, folder)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        engine: Any = build(resolved, 100, rank, Collectives(1))
        made = [engine.train_update(data(resolved, rank, 0), _accept).made]
        gc.collect()
        begun = time.time_ns()
        made.append(engine.train_update(data(resolved, rank, 1), _accept).made)
        ended = time.time_ns()
        gc.collect()
    assert made == [True, True], "there are no moments without an update"
    engine.release()
    total, most = 0, 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total) if begun <= event.start_ns() <= ended else most
    return {"peak": most, "rest": total}


def _accept(loss: float) -> bool:
    return True  # whatever it is: the first stage of a pipeline hears of no loss here
