"""The console shows our lines and nothing else; the log file has everything."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.state import TrainState, UpdateResult
from megagpt.training.console import Progress, duration

NOISY = """
import logging, os, sys, warnings
from pathlib import Path
from megagpt.training.console import Console
console = Console(Path(sys.argv[1]), rank=int(sys.argv[2])).__enter__()
console.say("ours")
print("a library prints")
os.write(1, b"a C library prints\\n")
os.write(2, b"and complains\\n")
warnings.warn("a warning")
logging.getLogger("DeepSpeed").warning("a logger")
console.__exit__(None, None, None)
print("after")
"""


@pytest.mark.parametrize(("rank", "shown"), [(0, "ours\nafter\n"), (1, "after\n")])
def test_only_our_lines_reach_the_console_and_all_reach_the_log(tmp_path, rank, shown):
    result = subprocess.run(
        [sys.executable, "-c", NOISY, str(tmp_path), str(rank)], capture_output=True, text=True, check=True
    )
    log = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
    assert (result.stdout, result.stderr) == (shown, "")
    for noise in ("ours", "a library prints", "a C library prints", "and complains", "a warning", "a logger"):
        assert noise in log


def test_a_console_that_is_gone_ends_no_run(tmp_path):
    """`megagpt train | head -1`, or a terminal that was closed: the log goes on."""
    code = NOISY.replace('console.say("ours")', 'import time; time.sleep(0.5); console.say("ours"); console.alarm("!")')
    code = code.replace('print("after")', "")
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    run.stdout.close()
    run.stderr.close()
    assert run.wait(timeout=60) == 0
    log = (tmp_path / "logs/rank-0.log").read_text()
    assert log.startswith("ours\n")
    assert "a library prints\n" in log  # where Python's own buffer puts it


def test_lines_of_a_run_are_aligned():
    progress = Progress(total=1200, tokens_per_update=1024)
    lines = []
    for update, loss in ((1, 10.5), (20, 7.25), (1200, 3.0625)):
        progress.end_update()
        lines.append(progress.line(TrainState(update), UpdateResult(loss, 1.5, 6e-4, 1024)))
    assert len({line.index("tokens/s") for line in lines}) == 1
    assert lines[0].startswith("   1/1200  loss 10.5000  lr 6.00e-04  grad norm  1.500")
    assert lines[2].endswith("ETA 0s")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (187, "3m07s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (18720, "5h12m"),
        (187200, "2d04h"),
    ],
)
def test_durations_read_well(seconds, words):
    assert duration(seconds) == words


@given(st.floats(0, 1e9))
def test_every_duration_can_be_said(seconds):
    assert duration(seconds)
