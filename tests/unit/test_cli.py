"""The `megagpt` command under each of its names, and the hidden subcommands that scripts call."""

import socket
import subprocess
import sys

import pytest

from megagpt.cli import main
from megagpt.cli.options import expand_home

RECIPE = """\
run_dir: runs/a
model: {preset: gpt2-124m}
data: {train: x}
batch: {global_size: 4}
optimizer: {lr: 1.0e-3}
schedule: {warmup_updates: 1}
length: {updates: 10}
"""


@pytest.mark.parametrize("module", ["megagpt", "megagpt.cli"])
def test_modules_run_the_command(module, tmp_path):
    arguments = [sys.executable, "-m", module, "status", str(tmp_path)]
    process = subprocess.run(arguments, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stdout.startswith("failed: the run never started")


def test_run_directory_accepts_the_arguments_of_train(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    assert main(["run-directory", str(path)]) == 0
    train_arguments = ["--resume", "must", "--max-minutes=5", "run_dir=runs/b", "ds.zero_optimization.stage=1"]
    assert main(["run-directory", str(path), *train_arguments]) == 0
    assert capsys.readouterr().out == "runs/a\nruns/b\n"


def test_run_directory_of_an_invalid_recipe_is_an_error(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("updates: 10", "updates: 0"))
    assert main(["run-directory", str(path)]) == 2
    assert "length.updates" in capsys.readouterr().err


def test_free_port_can_be_bound(capsys):
    assert main(["free-port"]) == 0
    with socket.socket() as server:
        server.bind(("127.0.0.1", int(capsys.readouterr().out)))


def test_home_is_expanded_in_options_but_not_in_text(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    arguments = ["--output=~/x", "--prompt=~/x", "--output", "a=~b", "run_dir=~/r"]
    assert expand_home(arguments) == ["--output=/h/x", "--prompt=~/x", "--output", "a=~b", "run_dir=~/r"]
