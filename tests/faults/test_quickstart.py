"""The first commands of a new user: the quickstart, also killed and restarted, and those in the README."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import training

ROOT = training.ROOT


@pytest.fixture
def clone(tmp_path):
    """Copy of the tracked files, with this environment as its .venv."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        target = tmp_path / "clone" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    venv = tmp_path / "clone" / ".venv"
    venv.mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (venv / part).symlink_to(Path(sys.prefix) / part)
    checksum = subprocess.run(["cksum", "setup.py"], cwd=venv.parent, capture_output=True, text=True, check=True)
    (venv / "installed-quickstart").write_text(checksum.stdout)
    return venv.parent


def start(clone, *arguments):
    return subprocess.Popen(
        ["bash", "launch/quickstart.sh", *arguments],
        cwd=clone,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


SHORT = (
    "length.updates=60",
    "batch.global_size=2",
    "evaluation.every=30",
    "evaluation.samples=16",
    "checkpoint.every=5",
)


def test_the_quickstart_resumes_after_a_kill_and_detects_that_it_is_complete(clone):
    run = clone / "runs/quickstart"
    process = start(clone, *SHORT)
    try:
        training.wait_for_update(run, 12, seconds=240)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the script, the launcher and the rank, without warning
        first = process.communicate()[0]
    assert "$ megagpt tokenizer train default" in first
    assert "$ megagpt prepare default" in first
    assert "deepspeed --num_accelerators" in first
    assert not (run / "DONE").exists()

    process = start(clone, *SHORT)
    second = process.communicate(timeout=400)[0]
    assert process.returncode == 0, second
    assert "$ megagpt prepare" not in second
    assert re.search(r"resumed  at update \d+", second)
    assert [update["update"] for update in training.curve(run)] == list(range(1, 61))
    for phrase in ("bits per byte", "xz -9e alone", "xz -9e, after reading", "unigram model", "loss.svg", "Next: "):
        assert phrase in second
    assert (run / "loss.svg").exists()
    foreign = [line for line in (first + second).splitlines() if re.search(r"WARNING|INFO|Warning|\[\d{4}-", line)]
    assert foreign == []

    third = start(clone).communicate(timeout=180)[0]
    assert "runs/quickstart is done." in third
    assert "$ " not in third


def test_an_unknown_option_is_refused(clone):
    process = start(clone, "--fast")
    assert process.communicate(timeout=180)[0] == (
        "megagpt: unknown option --fast\n  do: bash launch/quickstart.sh [--fresh] [key=value …]\n"
    )
    assert process.returncode == 2


def test_the_commands_of_the_readme_run_unchanged(clone):
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"<!-- run by the tests -->\n```bash\n(.*?)```", text, re.DOTALL)
    assert block.count("\n") >= 6
    env = {**os.environ, "PATH": f"{clone / '.venv/bin'}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=clone, env=env, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (clone / "runs/trial/DONE").exists()
    (example,) = re.findall(r"## Use it from Python\n\n```python\n(.*?)```", text, re.DOTALL)
    program = example.replace("runs/quickstart", "runs/trial")
    result = subprocess.run([sys.executable, "-c", program], cwd=clone, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(ast.literal_eval(result.stdout.splitlines()[0])) == 5


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert "megagpt/training/loop.py" in links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
