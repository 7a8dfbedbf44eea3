"""Starts processes quickly, by forking one that has already imported torch, DeepSpeed and megagpt.

In all other respects they are like a launcher's processes: each has its own pid and environment.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([  # the imports of a training process; torch's optimizers import dynamo
    "torch._dynamo", "megagpt.engine.build", "megagpt.engine.deepspeed_keys", "megagpt.engine.init_deepspeed",
    "megagpt.training.loop", "megagpt.prepare.command",
    "megagpt.checkpoint.listing", "tests.training", "tests.faults.hooks", "tests.parity.fuzz_rank",
])  # fmt: skip


def process(target: Any, *arguments: Any) -> BaseProcess:
    """Return a process that calls a module-level function with these arguments once it is started."""
    return _CONTEXT.Process(target=target, args=arguments)


def fresh_process(target: Any, *arguments: Any) -> BaseProcess:
    """The same as a new interpreter, which shares no memory with any other process."""
    return multiprocessing.get_context("spawn").Process(target=target, args=arguments)


@contextmanager
def running(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Start processes. Those that still run at the end of the `with` block are killed."""
    try:
        for one in processes:
            one.start()
        yield
    finally:
        for one in processes:
            if one.pid is not None:
                one.kill()
                one.join()
