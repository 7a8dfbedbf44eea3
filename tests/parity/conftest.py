"""The parity run: each world size once per session, with just the layouts that were asked for."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

WORST = pytest.StashKey()


def pytest_configure(config):
    config.stash[WORST] = {}


@pytest.fixture(scope="session")
def worst_differences(request):
    """Case id → kind → largest relative difference to the reference, shown when all is done."""
    return request.config.stash[WORST]


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[WORST]
    if rows:
        terminalreporter.section("largest relative difference to plain PyTorch")
    for case, kinds in rows.items():
        terminalreporter.line(f"{case:40}" + "".join(f"  {kind} {value:.1e}" for kind, value in kinds.items()))
