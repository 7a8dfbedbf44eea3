"""Processes that start quickly: forked from one process that has imported torch, DeepSpeed and megagpt already.

All else is as it is for a launcher's process: each has a pid and an environment of its own, and is killed alone.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.process import BaseProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([  # what a start of training imports; torch's optimizers import dynamo
    "torch._dynamo", "megagpt.engine.build", "megagpt.engine.deepspeed_keys", "megagpt.engine.init_deepspeed",
    "megagpt.training.loop", "megagpt.prepare.command",
    "megagpt.checkpoint.listing", "tests.training", "tests.faults.hooks", "tests.parity.fuzz_rank",
])  # fmt: skip


def process(target: Any, *arguments: Any) -> BaseProcess:
    """A process that calls a function of a module with these arguments, once started."""
    return _CONTEXT.Process(target=target, args=arguments)


def fresh_process(target: Any, *arguments: Any) -> BaseProcess:
    """The same as a new interpreter, which shares no memory with any other process."""
    return multiprocessing.get_context("spawn").Process(target=target, args=arguments)
