"""The `megagpt` command under each of its names, and the hidden subcommands that scripts call."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt import files
from megagpt.cli import main
from megagpt.cli.options import expand_home
from megagpt.errors import UserError

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "r", "--temperature", "nan"],
        ["generate", "r", "--temperature", "inf"],
        ["generate", "r", "--top-p", "nan"],
        ["train", "--recipe", "r", "--deepspeed_config", "d", "--max-minutes", "-1"],
        ["train", "--recipe", "r", "--deepspeed_config", "d", "--max-minutes", "nan"],
        ["train", "--recipe", "r", "--deepspeed_config", "d", "--expect-world-size", "0"],
        ["tokenizer", "train", "x", "--output", "t", "--vocab-size", "0"],
        ["prepare", "x", "--tokenizer", "t", "--output", "o", "--validation-fraction", "nan"],
        ["doctor", "--limit", "0"],
    ],
)
def test_number_out_of_range_names_the_option(arguments, capsys):
    assert main(arguments) == 2
    *_, option, value = arguments
    error = capsys.readouterr().err
    assert f"Invalid value for '{option}'" in error
    assert value in error


def test_run_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/megagpt")):
        with pytest.raises(UserError, match="the run directory cannot be created"):
            files.make_run_folder(path)


def test_run_directory_that_is_read_only_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not bind the superuser
    with pytest.raises(UserError, match="cannot be written to"):
        files.make_run_folder(tmp_path / "run")


def test_report_of_a_read_only_run_shows_everything_but_the_picture(tmp_path, monkeypatch, capsys):
    event = {"event": "update", "update": 1, "loss": 2.0, "tokens": 8, "seconds": 1.0, "data_seconds": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(event) + "\n")

    def refuse(path, text):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "replace_text", refuse)
    assert main(["report", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert "loss, nats per token" in output.out
    assert output.err.startswith("megagpt: the picture cannot be written: Read-only file system")


@pytest.mark.parametrize(
    ("argument", "do"),
    [
        ("--model.n_layer=3", "write model.n_layer=3, without dashes"),
        ("--optimizer.lr", "write optimizer.lr=VALUE, without dashes"),
        ("--ds.zero_optimization.stage=2", "write ds.zero_optimization.stage=2, without dashes"),
        ("--run_dir=x", "write run_dir=x, without dashes"),
    ],
)
def test_override_written_as_an_option_is_an_error(argument, do, capsys):
    assert main(["train", "--recipe", "r", "--deepspeed_config", "d", argument]) == 2
    key = argument[2:].partition("=")[0]
    assert capsys.readouterr().err == f"megagpt: {key} is not an option\n  command line  {argument}\n  do: {do}\n"


def test_unknown_accelerator_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("DS_ACCELERATOR", "gpu")
    for command in ("train", "parity"):
        assert main([command, "--recipe", "r", "--deepspeed_config", "d"]) == 2
        assert "DS_ACCELERATOR=gpu\n  do: unset it" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["srun.sbatch", "deepspeed.sbatch"])
def test_job_script_states_how_to_submit_it(script, tmp_path):
    path = ROOT / "launch/slurm" / script
    for folder, arguments, expected in (
        (tmp_path, ["r", "d"], "submit this job from the folder that holds launch/"),
        (ROOT, [], "give a recipe and a DeepSpeed config"),
    ):
        process = subprocess.run(["bash", path, *arguments], cwd=folder, capture_output=True, text=True)
        assert (process.returncode, expected in process.stderr) == (2, True)
