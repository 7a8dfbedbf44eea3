"""The commands of docs/tutorials run as they are written, in a folder with the files of a clone.

Every block of commands runs, unless a comment above it gives the reason why not. own-corpus.md runs first, and once:
the other tutorials start from copies of the folder that it leaves.
"""

import os
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from megagpt.prepare.readers.default_corpus import default_corpus
from tests import training

TUTORIALS = training.ROOT / "docs/tutorials"
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```bash\n(?P<commands>.*?)^```$", re.MULTILINE | re.DOTALL
)
FIRST, *OTHERS = ("own-corpus", "resume-and-branch", "export", "one-gpu-offload")


def blocks(name):
    """(commands, reason not to run them or None) of each block of a tutorial."""
    text = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    return [(match["commands"], match["reason"]) for match in BLOCK.finditer(text)]


def run(name, folder):
    """Run a tutorial in a folder, and return what it printed."""
    script = "\n".join(commands for commands, reason in blocks(name) if reason is None)
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(training.ROOT),
        "DS_ACCELERATOR": "cpu",
    }
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder after own-corpus.md, and what that printed."""
    folder = tmp_path_factory.mktemp("clone")
    for part in ("launch", "ds_configs"):
        shutil.copytree(training.ROOT / part, folder / part)
    (folder / "my-text").mkdir()
    for number, document in enumerate(islice(default_corpus().documents, 12)):
        (folder / f"my-text/{number}.txt").write_text(document.text, encoding="utf-8")
    return folder, run(FIRST, folder)


@pytest.fixture
def clone(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "clone", symlinks=True)
    return tmp_path / "clone"


def test_train_on_your_own_text(trained):
    folder, printed = trained
    assert (folder / "runs/my-gpt/DONE").exists()
    assert (folder / "runs/my-gpt/loss.svg").exists()
    curve = training.curve(folder / "runs/my-gpt")
    assert [update["update"] for update in curve] == list(range(1, 41))
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.5
    assert printed.count("The people of the United States") == 1  # of `generate`


def test_resume_and_branch(clone):
    before = training.curve(clone / "runs/my-gpt")
    run("resume-and-branch", clone)
    extended, branch = (training.curve(clone / "runs" / name) for name in ("my-gpt", "my-branch"))
    assert extended[:40] == before
    assert [update["update"] for update in extended] == list(range(1, 51))
    assert [update["update"] for update in branch] == list(range(41, 56))


def test_export(clone):
    printed = run("export", clone)
    assert (clone / "exported/model.safetensors").exists()
    assert "The people of the United States" in printed


def test_one_gpu_offload(clone):
    printed = run("one-gpu-offload", clone)
    assert "small-gpu" in printed  # among the configs that fit
    assert [update["update"] for update in training.curve(clone / "runs/rehearsal")] == [1, 2, 3]


def test_no_tutorial_is_left_out_and_only_what_needs_other_machines_is_not_run():
    names = {path.stem for path in TUTORIALS.glob("*.md")}
    assert names == {FIRST, *OTHERS, "slurm"}
    reasons = {reason for name in names for _, reason in blocks(name) if reason is not None}
    assert all("GPU" in reason or reason == "needs SLURM" for reason in reasons)
    assert all(reason == "needs SLURM" for _, reason in blocks("slurm"))


@pytest.mark.parametrize("name", [FIRST, *OTHERS, "slurm"])
def test_every_block_is_valid_shell(name):
    assert blocks(name)
    for commands, _ in blocks(name):
        subprocess.run(["bash", "-n", "-c", commands], check=True)


def test_the_slurm_tutorial_names_lines_that_the_job_scripts_have():
    text = (TUTORIALS / "slurm.md").read_text(encoding="utf-8")
    table = text.split("## 3.")[1].split("## 4.")[0]
    options = set(re.findall(r"`(--[a-z-]+)", table))
    assert len(options) >= 6
    script = (training.ROOT / "launch/slurm/srun.sbatch").read_text()
    assert {option for option in options if f"#SBATCH {option}" not in script} == set()
    for path in (training.ROOT / "launch/slurm").iterdir():
        subprocess.run(["bash", "-n", str(path)], check=True)
