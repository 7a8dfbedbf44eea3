"""The parity run: each world size once per session, with just the layouts that were asked for."""

import pytest

from tests.parity.layouts import CASES
from tests.parity.tables import known, table

WORST = "largest relative differences"  # in a test's report, which may come from another process


@pytest.fixture
def worst_differences(record_property):
    """Notes of a case, by its id, the largest relative difference of each kind to the reference."""
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
