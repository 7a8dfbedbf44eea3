"""Whatever fails on one rank of two is a failed save on both, and nothing else; real ranks over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.cluster import free_port
from tests.training import ROOT

WORKER = Path(__file__).with_name("saving_worker.py")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """What each rank found, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    started = []
    try:
        for rank in range(2):
            env = {**os.environ, **place, "RANK": str(rank)}
            started.append(subprocess.Popen([sys.executable, WORKER, folder], env=env, stdout=subprocess.PIPE))
        printed = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [0, 0], printed
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [[json.loads(line) for line in text.splitlines()] for text in printed]


def of_kind(cases, kind):
    """What was wrong: for each rank that looked, synchronous and asynchronous, the fault on rank 0 and on rank 1."""
    wrong = [case["wrong"] for found in cases for case in found if case["kind"] == kind]
    assert len(wrong) == 8
    return wrong


@pytest.mark.parametrize("kind", ["any call", "one part"])
def test_an_error_of_one_rank_is_a_failed_save_on_both_and_the_next_is_good(cases, kind):
    assert of_kind(cases, kind) == [""] * 8


def test_a_rename_that_waits_for_nobody_is_noticed_by_every_rank(cases):
    assert all(wrong.startswith("AssertionError") for wrong in of_kind(cases, "no barrier"))
