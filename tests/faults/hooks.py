"""Injects faults into a training process, at the points of the loop that the environment variable FAULTS describes.

FAULTS is a JSON list of {"kind", "rank", …}. Every fault that has happened appends a line to the file FIRED.
A process calls `install()` before training begins (from site/sitecustomize.py, or in a forked child).
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
import time

import torch

from megagpt.data.loader import Batch, Loader
from megagpt.training.watchdog import Watch


class Injected(RuntimeError):
    """Exception that a fault raises."""


def install() -> None:
    """Install the faults of this rank."""
    rank = int(os.environ.get("RANK", "0"))
    for fault in json.loads(os.environ.get("FAULTS", "[]")):
        if fault.get("rank", rank) == rank:
            INSTALL[fault["kind"]](fault)


def fired(fault: dict) -> None:
    """Record that a fault has happened, and when."""
    line = json.dumps({**fault, "pid": os.getpid(), "at": time.monotonic()}) + "\n"
    file = os.open(os.environ["FIRED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(file, line.encode())
    os.close(file)


def at_phase(fault: dict) -> None:
    """Call `act` when this rank enters `phase` of update `update` or a later one for the `nth` time."""
    enter, seen = Watch.enter, []

    def entered(watch: Watch, phase: str, update: int) -> None:
        enter(watch, phase, update)
        if phase == fault["phase"] and update >= fault["update"]:
            seen.append(update)
            if len(seen) == fault.get("nth", 1):
                act(fault)

    Watch.enter = entered


def act(fault: dict) -> None:
    """Wait for `seconds`, then record the fault, and raise an exception or send a signal unless `act` is "note"."""
    time.sleep(fault.get("seconds", 0))
    fired(fault)
    if fault["act"] == "raise":
        raise Injected(f"made to fail in {fault['phase']}")
    if fault["act"] != "note":
        os.kill(os.getpid(), signal.Signals[fault["act"]])


def slow(fault: dict) -> None:
    """Make each call of `method` ("module:Class.method") take `seconds` longer."""
    module, _, name = fault["method"].partition(":")
    owner = getattr(importlib.import_module(module), name.partition(".")[0])
    real = getattr(owner, name.partition(".")[2])

    def slowed(*arguments, **kwargs):
        time.sleep(fault["seconds"])
        return real(*arguments, **kwargs)

    setattr(owner, real.__name__, slowed)


def poison(fault: dict) -> None:
    """Make the updates that begin at one of `positions` compute NaN on this rank, as bad data would."""
    batches, embedding = Loader.batches, torch.nn.functional.embedding
    positions, bad = set(fault["positions"]), []

    def given(loader: Loader, position: int) -> list[Batch]:
        bad[:] = [True] if position in positions else []
        if bad:
            fired({**fault, "position": position})
        return batches(loader, position)

    def spoiled(*arguments, **kwargs):
        result = embedding(*arguments, **kwargs)
        return result * float("nan") if bad else result

    Loader.batches, torch.nn.functional.embedding = given, spoiled


def mislabel(fault: dict) -> None:
    """Replace every label by `token` in the updates that begin at one of `positions`: a high but finite loss."""
    batches, positions = Loader.batches, set(fault["positions"])

    def given(loader: Loader, position: int) -> list[Batch]:
        real = batches(loader, position)
        if position not in positions:
            return real
        fired({**fault, "position": position})
        return [Batch(one.input_ids, torch.full_like(one.labels, fault["token"])) for one in real]

    Loader.batches = given


def file_call(fault: dict) -> None:
    """Make megagpt's file system calls number `at` to `at` + `times` - 1 fail with `errno`."""
    number, code = [0], getattr(errno, fault["errno"])

    def failing(real):
        def call(*arguments, **kwargs):
            ours = "/megagpt/" in sys._getframe(1).f_code.co_filename
            if (
                not ours or not torch.distributed.is_initialized()
            ):  # before that, only a launcher can end the other ranks
                return real(*arguments, **kwargs)
            number[0] += 1
            if fault["at"] <= number[0] < fault["at"] + fault["times"]:
                fired({**fault, "call": real.__name__})
                raise OSError(code, os.strerror(code))
            return real(*arguments, **kwargs)

        return call

    for name in ("open", "write", "fsync", "rename", "replace"):
        setattr(os, name, failing(getattr(os, name)))


def clock_back(fault: dict) -> None:
    """Set the wall clock back by `seconds` from update `update` on."""
    real, enter, behind = time.time, Watch.enter, []

    def entered(watch: Watch, phase: str, update: int) -> None:
        if not behind and update >= fault["update"]:
            behind.append(fault["seconds"])
            fired(fault)
        enter(watch, phase, update)

    Watch.enter = entered
    time.time = lambda: real() - sum(behind)


INSTALL = {
    "begun": fired,
    "phase": at_phase,
    "slow": slow,
    "poison": poison,
    "mislabel": mislabel,
    "file call": file_call,
    "clock back": clock_back,
}
