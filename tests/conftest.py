"""Options of the whole test suite, the treatment of skipped tests, and the tiny corpus of training processes."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from megagpt.prepare.command import PrepareOptions, prepare_command, train_tokenizer_command
from tests import training


def pytest_addoption(parser):
    parser.addoption(
        "--allow-missing",
        action="store_true",
        help="pass even if tests were skipped on this machine, and list the reasons",
    )
    parser.addoption(
        "--full",
        action="store_true",
        help="also run what takes long: 100 updates of each layout, new random examples each time",
    )
    parser.addoption("--parity-table", type=Path, help="write each layout's largest differences to this file")


def pytest_configure(config):
    """Use the same random examples in every run, without a time limit. With --full they are different each time."""
    fresh = config.getoption("--full")
    settings.register_profile(
        "megagpt", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=not fresh
    )
    settings.load_profile("megagpt")


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory):
    """Keep the key files of jobs that tests start, on any host, in a temporary folder."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


def pytest_runtest_setup():
    torch.manual_seed(0)  # independent of the tests that ran before in this process


def not_proven(config):
    """Count skipped tests by reason. Each is a property that could not be tested on this machine."""
    reports = config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    return Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):  # one of several processes (run.sh), of which the first one decides
        return
    if session.exitstatus == 0 and not_proven(session.config) and not session.config.getoption("--allow-missing"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    """Print what could not be tested on this machine."""
    for reason, count in sorted(not_proven(config).items()):
        terminalreporter.line(f"NOT PROVEN ({count} tests): {reason}", red=True)
    if not_proven(config) and not config.getoption("--allow-missing"):
        terminalreporter.line("Nothing may be left unproven, unless --allow-missing is given.", red=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = tmp_path_factory.mktemp("text")
    inputs = [str(training.write_text(text))]
    train_tokenizer_command(inputs, 320, folder / "text")
    prepare_command(inputs, folder / "text.model", folder / "text", PrepareOptions(0.2))
    return folder


@pytest.fixture
def fp16(tmp_path_factory, monkeypatch):
    """Compute fp16 in software if the processor does not support it, here and in all processes that are started."""
    site = tmp_path_factory.mktemp("fp16")
    (site / "sitecustomize.py").write_text(
        "import torch\ntorch.ops.mkldnn._is_mkldnn_fp16_supported = lambda: True  # DeepSpeed calls it\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{site}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)


@pytest.fixture
def recipe(data, tmp_path):
    return training.write_recipe(tmp_path / "run", data)
