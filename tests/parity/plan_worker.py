"""One rank of four that trains two updates of each case, and records the memory of its tensors. Started by groups.py.

python -m tests.parity.plan_worker JOB.json
JOB: {"folder", "seconds", "cases": [ids]}; writes ID.json of each case

The engine and all of its allocations are real. The other ranks do not exist: torch's fake process group returns copies
of what this rank sends. With real ranks, gloo's threads would free tensors without the profiler noticing.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from megagpt.cluster import Collectives, Rank
from megagpt.engine.build import build
from megagpt.engine.init_deepspeed import start
from megagpt.engine.optim.muon_all_to_all import MuonAllToAll
from tests.parity import layouts
from tests.parity.plan_cases import CASES, WORLD
from tests.parity.state_worker import data


def main(job: dict[str, Any]) -> None:
    """Run the cases in order."""
    torch.set_num_threads(1)
    rank = Rank(rank=0, world_size=WORLD)
    torch.distributed.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    start(rank)
    # The fake group does not write to the receive buffer of a rank that sends nothing, as happens if a partition
    # boundary is between two matrices.
    MuonAllToAll._all_to_all = lambda _, source, target, *sizes: target.zero_()  # type: ignore[method-assign]
    for case in CASES:
        if case.id in job["cases"]:
            faulthandler.dump_traceback_later(job["seconds"], exit=True)
            answer = measure(case, Path(job["folder"]), rank)
            faulthandler.cancel_dump_traceback_later()
            (Path(job["folder"]) / f"{case.id}.json").write_text(json.dumps(answer))


def measure(case: layouts.Case, folder: Path, rank: Rank) -> dict[str, int]:
    """Return the bytes of all tensors: the peak in the second update, and those that remain after it.

    The profiler records every allocation.
    """
    resolved = layouts.resolve(case, folder)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        engine: Any = build(resolved, 100, rank, Collectives(1))
        made = [engine.train_update(data(resolved, rank, 0), _accept).made]
        gc.collect()
        begun = time.time_ns()
        made.append(engine.train_update(data(resolved, rank, 1), _accept).made)
        ended = time.time_ns()
        gc.collect()
    assert made == [True, True], "moments are allocated only if the update is made"
    engine.release()
    total, most = 0, 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total) if begun <= event.start_ns() <= ended else most
    return {"peak": most, "rest": total}


def _accept(loss: float) -> bool:
    return True  # any loss: with the fake process group, the first stage of a pipeline does not receive it


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
