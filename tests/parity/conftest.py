"""Collects the largest differences of all layouts, and prints or writes them as a table at the end of the session."""

import pytest

from tests.parity.layouts import CASES
from tests.parity.tables import known, table

WORST = "largest relative differences"  # a property of test reports, since tests may run in another process


@pytest.fixture
def worst_differences(record_property):
    """Return a function that records a case's largest relative difference of each kind."""
    return lambda case, kinds: record_property(WORST, (case, kinds))


def pytest_terminal_summary(terminalreporter, config):
    reports = [one for kind in ("passed", "failed") for one in terminalreporter.stats.get(kind, ())]
    found = dict(value for one in reports for name, value in one.user_properties if name == WORST)
    rows = {case.id: found[case.id] for case in CASES if case.id in found}
    path = config.getoption("parity_table")
    if rows and path:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = known(path) | rows
        path.write_text(
            table({case.id: found[case.id] for case in CASES if case.id in found}, config.getoption("full"))
        )
    if rows:
        terminalreporter.section("largest relative difference to plain PyTorch")
    for case, kinds in rows.items():
        terminalreporter.line(f"{case:40}" + "".join(f"  {kind} {value:.1e}" for kind, value in kinds.items()))
