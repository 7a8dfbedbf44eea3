"""What happens on systems that training does not work on."""

import sys

from megagpt.cli import main


def test_training_elsewhere_than_on_linux_is_refused_in_words(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["train", "--recipe", "r.yaml", "--deepspeed_config", "d.json"]) == 2
    assert capsys.readouterr().err == (
        "megagpt: training needs Linux, and this is darwin\n"
        "  do: use WSL 2 on Windows, a virtual machine on macOS\n"
    )  # fmt: skip
