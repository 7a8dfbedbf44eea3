"""`megagpt --help` lists every command in order of use, without truncating any description."""

import subprocess
import sys

import pytest

from megagpt import __version__
from megagpt.cli import main


def help_of(*arguments):
    program = "import sys; from megagpt.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *arguments, "--help"]
    run = subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert run.returncode == 0
    return run.stdout


def test_each_command_is_described_on_one_complete_line():
    commands = help_of().split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in commands][:3] == ["tokenizer", "prepare", "data"]
    assert len(commands) == 16
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)


def test_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megagpt {__version__}\n"


@pytest.mark.parametrize(
    ("option", "value"), [("--tokens", "-1"), ("--temperature", "-0.5"), ("--top-k", "0"), ("--top-p", "2")]
)
def test_invalid_sampling_options_are_rejected(option, value, capsys):
    assert main(["generate", "nowhere", option, value]) == 2
    assert option in capsys.readouterr().err
