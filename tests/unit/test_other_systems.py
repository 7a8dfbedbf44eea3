"""Training on unsupported operating systems."""

import sys

from megagpt.cli import main


def test_training_on_other_systems_than_linux_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["train", "--recipe", "r.yaml", "--deepspeed_config", "d.json"]) == 2
    assert capsys.readouterr().err == (
        "megagpt: training needs Linux, but this is darwin\n"
        "  do: use WSL 2 on Windows, or a virtual machine on macOS\n"
    )  # fmt: skip
