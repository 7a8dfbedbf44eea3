"""The console shows our lines and nothing else, the log file has everything, and no output can end a run."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.data.evaluation_batches import perplexity
from megagpt.state import TrainState, UpdateResult
from megagpt.training import loop
from megagpt.training.console import Progress, display_only, duration

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


ANY_TEXT = r"""
import sys
from pathlib import Path
from megagpt.training.console import Console
with Console(Path(sys.argv[1]), rank=0) as console:
    console.say("2 \u00d7 cpu, \u6f22, \U0001f600, half a surrogate pair: \ud800")
    console.alarm("alarm \u00d7 \ud800")
    print("a library prints \u00d7 \ud800")
print("after")
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16", "shift_jis"])
def test_characters_that_an_encoding_lacks_end_no_run(tmp_path, encoding):
    result = subprocess.run(
        [sys.executable, "-c", ANY_TEXT, str(tmp_path)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode("utf-8", "ignore").startswith("2 × cpu, 漢, 😀, half a surrogate pair: ")
    assert "after".encode(encoding).removeprefix(b"\xff\xfe") in result.stdout  # the stream has its encoding back
    assert result.stderr.decode() == "alarm × ?\n"
    log = (tmp_path / "logs/rank-0.log").read_text(encoding="utf-8")
    assert "2 × cpu, 漢, 😀" in log
    assert "a library prints × \\ud800\n" in log


NUMBERS = [0.0, -1.0, 709.0, 710.0, 1e308, -1e308, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("value", NUMBERS)
def test_no_number_is_too_strange_to_show(value):
    progress = Progress(total=3, tokens_per_update=1024)
    assert "loss" in progress.line(TrainState(1), UpdateResult(value, value, value, 1024))
    assert duration(value)
    lines = []
    run = SimpleNamespace(console=SimpleNamespace(say=lines.append))
    loop.show_validation(run, TrainState(30), value, value, {"a": value})
    assert lines[0].startswith(f" validation  update 30  loss {value:7.4f}  perplexity ")


@pytest.mark.parametrize("loss", NUMBERS)
def test_perplexity_is_infinite_where_a_float_overflows(loss):
    with np.errstate(over="ignore"):
        expected = np.exp(np.longdouble(loss))  # its exponents are larger
    if expected > sys.float_info.max:
        expected = math.inf
    assert perplexity(loss) == pytest.approx(float(expected), nan_ok=True)


def test_an_error_while_formatting_goes_to_the_log(capsys):
    with display_only():
        math.exp(710)
    assert "OverflowError: math range error" in capsys.readouterr().err


def test_commands_print_to_a_terminal_that_knows_only_ascii(tmp_path):
    updates = [{"event": "update", "update": n, "loss": 3.0 / n, "tokens": 10 * n, "seconds": 1.0} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(update) + "\n" for update in updates))
    result = subprocess.run(
        [sys.executable, "-m", "megagpt.cli", "report", str(tmp_path)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()
    assert b"time: 3s: compute 100.0%" in result.stdout
