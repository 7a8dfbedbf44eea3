"""Starts process groups of ranks without a launcher, and ends them within a time limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagpt.cluster import free_port
from tests.parity.layouts import Case

SECONDS = 300  # per case; a rank that takes longer prints its stack and exits
ROOT = Path(__file__).parents[2]


def run_cases(cases: list[Case], folder: Path, updates: int, total: int) -> dict[str, str]:
    """Run the cases of one world size in one process group.

    If a case fails, its ranks may no longer be in step, and so the remaining cases run in a new group.

    Returns:
        The ranks' logs of each case that failed, by id.
    """
    failed: dict[str, str] = {}
    pending = list(cases)
    while pending:
        log = _run_group(pending, folder, updates, total)
        left = [case for case in pending if not (folder / f"{case.id}.json").exists()]
        if left:
            failed[left[0].id] = log
        pending = left[1:]
    return failed


def _run_group(cases: list[Case], folder: Path, updates: int, total: int) -> str:
    """Run the cases in one process group, and return the end of the ranks' logs."""
    job = {"folder": str(folder), "updates": updates, "total": total, "cases": [case.id for case in cases]}
    return launch("worker", cases[0].world, job, folder, SECONDS * len(cases) + 60)


def answers_of(program: str, cases: list[Case], folder: Path) -> Callable[[Case], dict[str, Any]]:
    """Run a program of this folder on all cases, with one process group per world size.

    Returns:
        A function that returns the JSON result of a case, or fails the test with the ranks' logs.
    """
    worlds = defaultdict(list)
    for case in cases:
        worlds[case.world].append(case.id)
    logs = {
        world: launch(program, world, {"folder": str(folder), "cases": ids}, folder, SECONDS * len(ids))
        for world, ids in worlds.items()
    }

    def answer(case: Case) -> dict[str, Any]:
        path = folder / f"{case.id}.json"
        if not path.exists():
            pytest.fail(logs[case.world], pytrace=False)
        return json.loads(path.read_text())

    return answer


def launch(program: str, world: int, job: dict[str, Any], folder: Path, seconds: float) -> str:
    """Run a program of this folder on `world` ranks until all end or one fails, and return the end of their logs."""
    path = folder / "job.json"
    path.write_text(json.dumps({"seconds": SECONDS, **job}))
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCHDYNAMO_DISABLE": "1",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": str(ROOT),
    }
    logs = [folder / f"rank-{rank}.log" for rank in range(world)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", f"tests.parity.{program}", str(path)],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        _wait(ranks, seconds)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)


def _wait(ranks: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait until all ranks have ended or the time is up. After one has failed, the others get 5 s to report errors."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        codes = [process.poll() for process in ranks]
        if None not in codes:
            return
        if any(codes):
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.1)
