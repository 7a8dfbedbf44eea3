"""One rank that trains layouts with a save, then repeats the updates after the save from it. Started by groups.py.

The job: {"folder", "seconds", "cases": [ids]}; writes ID.json of each case
"""

from __future__ import annotations

import faulthandler
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megagpt.cluster import Collectives, Rank, from_environment
from megagpt.data.loader import Batch
from megagpt.engine.build import build
from megagpt.engine.init_deepspeed import start, stop
from megagpt.files import folder_writer
from megagpt.model.gpt import GPT
from tests.parity import layouts

BEFORE, AFTER = range(3), range(3, 6)  # updates


def main(job: dict[str, Any]) -> None:
    """Run the cases in order."""
    torch.set_num_threads(1)
    rank = from_environment(os.environ)
    start(rank)
    collectives = Collectives(rank.world_size)
    for case in layouts.CASES:
        if case.id in job["cases"]:
            faulthandler.dump_traceback_later(job["seconds"], exit=True)
            answer = run(case, Path(job["folder"]), rank, collectives)
            faulthandler.cancel_dump_traceback_later()
            if rank.main:
                (Path(job["folder"]) / f"{case.id}.json").write_text(json.dumps(answer))
    stop()


def run(case: layouts.Case, folder: Path, rank: Rank, collectives: Collectives) -> dict[str, Any]:
    """Test one layout, and return the results."""
    resolved = layouts.resolve(case, folder)
    saved = folder / f"{case.id}-saved"
    if rank.main:
        saved.mkdir()
    collectives.barrier()
    engine: Any = build(resolved, 100, rank, collectives)
    for update in BEFORE:
        engine.train_update(data(resolved, rank, update))
    engine.save_state(folder_writer(saved))
    straight = [engine.train_update(data(resolved, rank, update)) for update in AFTER]
    weights = {name: value.clone() for name, value in engine.weights()}
    tied, tensor = tied_matrices(engine), resolved.layout.tensor_parallel  # each tensor-parallel rank has its own rows
    engine.release()

    again: Any = build(resolved, 100, rank, collectives)
    again.load_state(saved)
    results, held_out = [], ragged(resolved, rank)
    for update in AFTER:
        evaluation = again.evaluate(held_out)
        results.append(again.train_update(data(resolved, rank, update)))
    again_weights = dict(again.weights())
    evaluation = again.evaluate(held_out)
    again.release()
    return {
        "same results": results == straight,
        "same weights": all(torch.equal(value, weights[name]) for name, value in again_weights.items()),
        "tied matrices": len(tied),
        "tied matrices are equal": all(torch.equal(matrix, tied[rank % tensor]) for rank, matrix in enumerate(tied)),
        "evaluation": evaluation,
        "evaluation expected": expected(resolved, weights),
    }


def data(resolved: Any, rank: Rank, update: int) -> list[Batch]:
    """Return this rank's micro-batches of one update."""
    size = layouts.GLOBAL_BATCH
    return layouts.share(layouts.samples(resolved.recipe, size, update * size), resolved.layout, rank)


def ragged(resolved: Any, rank: Rank) -> list[Batch]:
    """Return held-out samples in another number of batches than in training, of which the last one is smaller."""
    samples = layouts.samples(resolved.recipe, layouts.HELD_OUT, layouts.HELD_OUT_FROM)
    batches = layouts.share(samples, resolved.layout, rank)
    kept = batches[0]
    return [*batches, *batches[:1], Batch(kept.input_ids[:1], kept.labels[:1])]


@torch.no_grad()
def expected(resolved: Any, weights: dict[str, torch.Tensor]) -> float:
    """Compute the loss over `ragged` of all data-parallel ranks with plain PyTorch."""
    model = GPT(resolved.recipe.model)
    model.load_state_dict(weights)
    layout = resolved.layout
    step = layout.tensor_parallel * layout.sequence_parallel
    batches = [batch for first in range(layout.data_parallel) for batch in ragged(resolved, Rank(first * step))]
    logits = torch.cat([model(batch.input_ids).logits for batch in batches]).flatten(0, 1)
    labels = torch.cat([batch.labels for batch in batches]).flatten()
    return F.cross_entropy(logits, labels, ignore_index=-100).item()


def tied_matrices(engine: Any) -> list[torch.Tensor]:
    """Return the copies of the tied matrix on all ranks of a pipeline; without a pipeline there are none."""
    names = engine._stage.names.items() if hasattr(engine, "_stage") else ()
    mine = [parameter.detach().clone() for parameter, name in names if name == "layers.0.weight"]
    copies: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(copies, mine)
    return [matrix for matrices in copies for matrix in matrices]
