"""One rank of a process group that runs many layouts one after another. Started by groups.py.

python -m tests.parity.worker JOB.json
JOB: {"folder", "updates", "total", "seconds", "cases": [ids]}
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from megagpt.cluster import Collectives, Rank, from_environment
from megagpt.engine.build import build
from megagpt.engine.init_deepspeed import start, stop
from megagpt.parity.curve import Curve
from tests.parity import curve as curves
from tests.parity import layouts, mutants, needs


def main(job: dict[str, Any]) -> None:
    """Run the cases in order; rank 0 writes the curve of each."""
    torch.set_num_threads(1)
    rank = from_environment(os.environ)
    start(rank)
    collectives = Collectives(rank.world_size)
    cases = {case.id: case for case in (*layouts.CASES, *mutants.SEEDS)}
    for id in job["cases"]:
        # limits each case, since a rank may fail while the others wait for it
        faulthandler.dump_traceback_later(job["seconds"], exit=True)
        if id in mutants.MUTANTS:
            with mutants.MUTANTS[id].planted():
                run(mutants.MUTANTS[id].case, job, rank, collectives)
        else:
            run(cases[id], job, rank, collectives)
        faulthandler.cancel_dump_traceback_later()
    stop()


def run(case: layouts.Case, job: dict[str, Any], rank: Rank, collectives: Collectives) -> None:
    """Train one layout, and write its curve."""
    folder = Path(job["folder"])
    needs.provide(case)
    resolved = layouts.resolve(case, folder)
    engine = build(resolved, job["total"], rank, collectives)
    initial = {name: value.clone() for name, value in engine.weights()}  # cloned: stage 0 returns the live tensors
    held_out = layouts.share(
        layouts.samples(resolved.recipe, layouts.HELD_OUT, layouts.HELD_OUT_FROM), resolved.layout, rank
    )
    evaluations = [engine.evaluate(held_out)]
    results = []
    for update in range(job["updates"]):
        data = layouts.samples(resolved.recipe, layouts.GLOBAL_BATCH, update * layouts.GLOBAL_BATCH)
        results.append(engine.train_update(layouts.share(data, resolved.layout, rank)))
        if update == 1:
            engine.evaluate(held_out)  # must not disturb training
    evaluations.append(engine.evaluate(held_out))
    check_moved(engine)
    columns = zip(*((row.loss, row.grad_norm, row.lr, row.tokens) for row in results), strict=True)
    curve = Curve(*map(list, columns), evaluations, initial, dict(engine.weights()))
    if rank.main:
        curves.save(curve, folder / case.id)
    engine.release()
    del engine
    gc.collect()


def check_moved(engine: Any) -> None:
    """Check that the optimizer has changed the moments of all its tensors on this rank."""
    wrapper = engine._engine.optimizer
    inner = getattr(wrapper, "optimizer", wrapper)
    # DeepSpeed's safe_get_* functions find only the moments of the first parameter group.
    kinds = ("exp_avg", "momentum_buffer")
    moments = [state[kind] for state in inner.state.values() for kind in kinds if kind in state]
    assert moments
    for moment in moments:
        assert not moment.numel() or moment.abs().max() > 0


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
