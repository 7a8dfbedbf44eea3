"""Options of the whole test suite, and the tiny corpus that real training processes use."""

from pathlib import Path

import pytest

from megagpt.prepare import Options, prepare_command, train_tokenizer_command
from tests import training


def pytest_addoption(parser):
    parser.addoption(
        "--allow-missing", action="store_true", help="pass where this machine cannot prove all, and say what"
    )
    parser.addoption(
        "--full", action="store_true", help="also what takes long: 100 updates of each layout, several hosts"
    )
    parser.addoption("--parity-table", type=Path, help="write each layout's largest differences to this file")


def pytest_terminal_summary(terminalreporter):
    """Say aloud what this machine could not prove."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [report.longrepr[2] for report in skipped if "NOT PROVEN" in str(report.longrepr)]
    for reason in sorted(set(reasons)):
        terminalreporter.line(f"{reason} ({reasons.count(reason)} tests)", red=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = tmp_path_factory.mktemp("text")
    inputs = [str(training.write_text(text))]
    train_tokenizer_command(inputs, 320, folder / "text")
    prepare_command(inputs, folder / "text.model", folder / "text", Options(0.2))
    return folder


@pytest.fixture
def recipe(data, tmp_path):
    return training.write_recipe(tmp_path / "run", data)
