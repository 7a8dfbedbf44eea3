"""The comparison with plain PyTorch is sensitive: planted bugs make it fail, and other seeds do not."""

from __future__ import annotations

import pytest

from megagpt.parity.curve import compare
from tests.parity import curve, layouts, mutants, reference
from tests.parity.groups import run_cases

UPDATES = 6
TOTAL = 100


@pytest.fixture(scope="session")
def differences(tmp_path_factory):
    """Differences that are too large, and the logs of cases that failed, by case id. All run in one process group."""
    folder = tmp_path_factory.mktemp("mutants")
    cases = [*(mutant.case for mutant in mutants.MUTANTS.values()), *mutants.SEEDS]
    failed = run_cases(cases, folder, UPDATES, TOTAL)
    found, expected = {}, {}
    for case in cases:
        if case.id in failed:
            continue
        if case.recipe not in expected:
            recipe = layouts.recipe_of(case, folder)
            data = [layouts.samples(recipe, layouts.GLOBAL_BATCH, n * layouts.GLOBAL_BATCH) for n in range(UPDATES)]
            held_out = layouts.samples(recipe, layouts.HELD_OUT, layouts.HELD_OUT_FROM)
            expected[case.recipe] = recipe, reference.train(recipe, data, TOTAL, held_out)
        rows = compare(*expected[case.recipe], curve.load(folder / case.id))
        found[case.id] = [row for row in rows if row.too_far]
    return found, failed


@pytest.mark.parametrize("id", mutants.MUTANTS)
def test_a_planted_bug_is_found(id, differences):
    found, failed = differences
    assert id not in failed, failed[id]  # a mutant must train to the end: it is to be found by its numbers
    assert found[id]


@pytest.mark.parametrize("case", mutants.SEEDS, ids=lambda case: case.id)
def test_another_seed_gives_no_false_alarm(case, differences):
    found, failed = differences
    assert case.id not in failed, failed[case.id]
    assert not found[case.id], [str(row) for row in found[case.id]]
