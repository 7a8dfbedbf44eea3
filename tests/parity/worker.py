"""One rank of a process group that runs many layouts one after another. Started by groups.py.

worker.py JOB.json      JOB: {"folder", "updates", "total", "seconds", "cases": [ids]}
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import layouts
import torch
from safetensors.torch import save_file

from megagpt.data.loader import Batch
from megagpt.distributed import Agreement, Rank, from_environment
from megagpt.engine.build import build
from megagpt.engine.start import start, stop


def main(job: dict[str, Any]) -> None:
    """Run the cases in order; rank 0 writes ID.json and ID.safetensors of each, the JSON last."""
    torch.set_num_threads(1)
    rank = from_environment(os.environ)
    start(rank)
    agreement = Agreement(rank.world_size)
    for case in layouts.CASES:
        if case.id in job["cases"]:
            # one rank of a group may fail while the others wait for it: a limit for each case
            faulthandler.dump_traceback_later(job["seconds"], exit=True)
            run(case, job, rank, agreement)
            faulthandler.cancel_dump_traceback_later()
    stop()


def run(case: layouts.Case, job: dict[str, Any], rank: Rank, agreement: Agreement) -> None:
    """Train one layout and write what it did."""
    folder = Path(job["folder"])
    resolved = layouts.resolve(case, folder)
    engine = build(resolved, job["total"], rank, agreement)
    initial = {name: digest(value) for name, value in engine.weights()}
    held_out = share(layouts.samples(resolved.recipe, layouts.HELD_OUT, layouts.HELD_OUT_FROM), resolved.layout, rank)
    curve: dict[str, list[float]] = {"losses": [], "norms": [], "lrs": [], "tokens": []}
    evaluations = [engine.evaluate(held_out)]
    for update in range(job["updates"]):
        data = layouts.samples(resolved.recipe, layouts.GLOBAL_BATCH, update * layouts.GLOBAL_BATCH)
        result = engine.train_update(share(data, resolved.layout, rank))
        for key, value in zip(curve, (result.loss, result.grad_norm, result.lr, result.tokens), strict=True):
            curve[key].append(value)
    evaluations.append(engine.evaluate(held_out))
    weights = dict(engine.weights())
    moments = moved(engine)
    if rank.main:
        save_file(weights, folder / f"{case.id}.safetensors")
        answer = {**curve, "held_out": evaluations, "initial": initial, "moments": moments}
        (folder / f"{case.id}.json").write_text(json.dumps(answer))
    engine.release()
    del engine
    gc.collect()


def moved(engine: Any) -> list[float]:
    """The largest first moment of each tensor that this rank's optimizer works on; 0 where it did nothing."""
    wrapper = engine._engine.optimizer
    inner = getattr(wrapper, "optimizer", wrapper)
    # not through DeepSpeed's safe_get_*: with two parameter groups it finds the moments of the first one only
    moments = [state["exp_avg"] for state in inner.state.values() if "exp_avg" in state]
    return [value.abs().max().item() for value in moments if value.numel()]


def share(samples: tuple[torch.Tensor, torch.Tensor], layout: Any, rank: Rank) -> list[Batch]:
    """This rank's micro-batches: sample k of micro-step j on data rank r is j·micro·ranks + r·micro + k."""
    micro, ranks = layout.micro_batch, layout.data_parallel
    starts = range(layout.data_rank(rank.rank) * micro, len(samples[0]), micro * ranks)
    return [Batch(*(tensor[start : start + micro] for tensor in samples)) for start in starts]


def digest(value: torch.Tensor) -> str:
    """A hash of a tensor's bits."""
    return hashlib.blake2b(value.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
