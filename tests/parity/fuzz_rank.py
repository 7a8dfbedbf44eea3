"""What one rank does in a drawn case: build the engine, train, save for the next layout, and report."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megagpt.cluster import Collectives, Rank, from_environment
from megagpt.config.recipe import Recipe
from megagpt.engine.build import build
from megagpt.engine.init_deepspeed import start, stop
from megagpt.engine.state.rng_and_loss_scale import RngAndLossScaleSnapshot
from megagpt.errors import UserError
from megagpt.files import folder_writer
from tests.parity import layouts, mutants, needs
from tests.parity.layouts import Case
from tests.parity.skip_worker import Planted

LIMIT = 300  # seconds for all that a rank does; whoever started it usually ends a hang long before
ATTEMPTS = 30  # of an update in fp16, whose loss scale may begin far too high
Step = tuple[str, int]
"""("update", n), ("evaluate", n), or a kind of bad update and n; n numbers the global batch that it takes"""


@dataclass(frozen=True)
class Part:
    """What the ranks of one layout do: `steps`, after loading what another layout saved."""

    case: Case
    steps: tuple[Step, ...]
    labels: str
    total: int
    folder: Path
    load: Path | None = None
    save: Path | None = None
    planted: str | None = None
    """a bug of mutants.py, or "hang", to test the fuzzer itself"""


def samples(recipe: Recipe, labels: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and labels [global batch, seq] of global batch `number`.

    Labels are "whole", "ragged" (each sequence ignores a tail of its own, up to all but one label), or "packed" (the
    tail is padding: repeated document ends, none of which is predicted after another).
    """
    size = recipe.batch.global_size
    ids, wanted = layouts.samples(recipe, size, number * size)
    if labels == "ragged":
        wanted[0, 0] = ids[0, 1]  # or a small batch may have no label at all
        return ids, wanted
    if labels == "packed":
        chance, length = torch.Generator().manual_seed(number), recipe.model.seq_len
        starts = length - torch.randint(length // 2 + 1, (size, 1), generator=chance)
        padding = torch.arange(length) >= starts
        ids = ids.masked_fill(padding, recipe.data.eod or 0)
    wanted = torch.cat((ids[:, 1:], ids[:, :1]), dim=1)  # any label will do after the last token
    return ids, wanted.masked_fill(padding, -100) if labels == "packed" else wanted


def run(environment: dict[str, str], part: Part) -> None:
    """Run one rank in a process of its own; its report is `rank-N.pt` in the part's folder."""
    os.environ.update(environment)
    number = int(environment["RANK"])
    log = os.open(part.folder / f"rank-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    code = 0
    try:
        report = _report(part) | {"seconds": time.process_time()}
        path = part.folder / f"rank-{number}.pt"
        torch.save(report, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not through exit handlers, which may wait for other ranks


def _report(part: Part) -> dict[str, Any]:
    torch.set_num_threads(1)
    needs.provide(part.case)
    rank = from_environment(os.environ)
    try:
        resolved = layouts.resolve(part.case, part.folder)
        start(rank)
        with _planted(part.planted):
            return _train(part, resolved, rank)
    except UserError as error:
        return {"refused": str(error)}


def _planted(name: str | None) -> AbstractContextManager[Any]:
    if name is None:
        return nullcontext()
    if name == "hang":
        return patch.object(RngAndLossScaleSnapshot, "restore", _hang)
    return mutants.MUTANTS[name].planted()


def _hang(*_: Any) -> None:
    threading.Event().wait()


def _train(part: Part, resolved: Any, rank: Rank) -> dict[str, Any]:
    collectives = Collectives(rank.world_size)
    engine: Any = build(resolved, part.total, rank, collectives)
    initial = {name: value.clone() for name, value in engine.weights()}  # at stage 0 they are the live ones
    if part.load is not None:
        engine.load_state(part.load)
    planted = Planted(True)
    record = []
    for kind, number in part.steps:
        batches = layouts.share(samples(resolved.recipe, part.labels, number), resolved.layout, rank)
        record.append((kind, number, *_step(engine, kind, batches, planted)))
    if part.save is not None:
        engine.save_state(folder_writer(part.save))
        collectives.barrier()
    weights = dict(engine.weights())
    differing = engine.replicas_differ()
    engine.release()
    stop()
    kept = (initial, weights) if rank.main else ({}, {})
    return {"refused": None, "record": record, "initial": kept[0], "weights": kept[1], "replicas differ": differing}


def _step(engine: Any, kind: str, batches: list[Any], planted: Planted) -> tuple[Any, ...]:
    """Loss, gradient norm, learning rate, tokens, whether the update was made; of an evaluation the loss alone."""
    if kind == "evaluate":
        return (engine.evaluate(batches),)
    accept: Callable[[float], bool] = (lambda _: False) if kind == "refused loss" else math.isfinite
    planted.bad = {"loss of NaN": "loss", "infinite gradient": "gradient"}.get(kind, "")
    attempts = ATTEMPTS if kind == "update" else 1
    for _ in range(attempts):
        result = engine.train_update(batches, accept)
        if result.made or result.scale is None:
            break
    planted.bad = ""
    return result.loss, result.grad_norm, result.lr, result.tokens, result.made
