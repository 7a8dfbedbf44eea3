"""What `megagpt --help` shows: every command, in the order of use, none of its words cut off."""

import subprocess
import sys

import pytest

from megagpt import __version__
from megagpt.cli import main


def help_of(*words):
    program = "import sys; from megagpt.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *words, "--help"]
    run = subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert run.returncode == 0
    return run.stdout


def test_each_command_is_told_in_one_whole_line():
    commands = help_of().split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in commands][:3] == ["tokenizer", "prepare", "data"]
    assert len(commands) == 16
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megagpt {__version__}\n"


@pytest.mark.parametrize(
    ("option", "value"), [("--tokens", "-1"), ("--temperature", "-0.5"), ("--top-k", "0"), ("--top-p", "2")]
)
def test_what_cannot_be_drawn_from_is_refused(option, value, capsys):
    assert main(["generate", "nowhere", option, value]) == 2
    assert option in capsys.readouterr().err
