"""The command by each of its names."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["megagpt", "megagpt.cli"])
def test_the_modules_are_the_command(module, tmp_path):
    words = [sys.executable, "-m", module, "status", str(tmp_path)]
    made = subprocess.run(words, capture_output=True, text=True)
    assert (made.returncode, made.stdout) == (1, "failed: it never started, or DONE was taken away\n")
