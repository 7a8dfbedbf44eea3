"""Every layout trains the same: the loss and gradient norm of each update and the final weights match plain PyTorch."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest

from megagpt.model import flops
from megagpt.parity.curve import KINDS, compare, worst
from tests.parity import curve as curves
from tests.parity import layouts, reference
from tests.parity.groups import run_cases
from tests.parity.needs import missing

TOTAL = 100  # length of the schedule, even if fewer updates are made


@pytest.fixture(scope="session")
def updates(request):
    return (
        TOTAL if request.config.getoption("--full") else 12
    )  # 6 updates are enough to find every planted bug, see test_mutants.py


@pytest.fixture(scope="session")
def results(request, tmp_path_factory, updates):
    """Return a function that returns the curve of a case. All cases of a world size run when the first is needed."""
    selected = {item.callspec.params["case"].id: item.callspec.params["case"] for item in _selected(request)}
    failed, done = {}, {}
    folder = tmp_path_factory.mktemp("parity")

    def result(case):
        if reason := missing(case):
            pytest.skip(reason)
        if case.world not in done:
            cases = [other for other in selected.values() if other.world == case.world and not missing(other)]
            failed.update(run_cases(cases, folder, updates, TOTAL))
            done[case.world] = True
        if case.id in failed:
            pytest.fail(failed[case.id], pytrace=False)
        return curves.load(folder / case.id)

    return result


def _selected(request):
    return [item for item in request.session.items if item.function.__name__ == "test_same_curve"]


@pytest.fixture(scope="session")
def curve(tmp_path_factory, updates):
    """Reference curve by recipe."""
    folder = tmp_path_factory.mktemp("reference")

    @lru_cache
    def of(overrides):
        case = layouts.Case("reference", 1, {}, overrides)
        recipe = layouts.recipe_of(case, folder)
        data = [layouts.samples(recipe, layouts.GLOBAL_BATCH, n * layouts.GLOBAL_BATCH) for n in range(updates)]
        held_out = layouts.samples(recipe, layouts.HELD_OUT, layouts.HELD_OUT_FROM)
        return recipe, reference.train(recipe, data, TOTAL, held_out)

    return of


def test_the_table_names_every_layout():
    rows = (Path(__file__).parents[2] / "docs/parity.md").read_text().splitlines()
    assert [row.split(" | ")[0][2:] for row in rows if row.startswith("| ")][1:] == [case.id for case in layouts.CASES]


STAGES = [case for case in layouts.CASES if case.id.startswith("stages-")]


@pytest.mark.parametrize("case", STAGES, ids=lambda case: case.id)
def test_cases_are_named_by_the_layers_of_their_stages(case, tmp_path):
    model = layouts.recipe_of(case, tmp_path).model
    layers = ["E", *("P" if model.position == "learned" else ""), *("B" * model.n_layer), "N", "H"]
    cuts = flops.boundaries(flops.layer_costs(model), case.config["pipeline"]["stages"])
    stages = ["".join(layers[first:last]) for first, last in pairwise(cuts)]
    assert case.id.removeprefix("stages-").split("-")[: len(stages)] == stages


def test_every_kind_of_stage_has_a_case():
    kinds = {part for case in STAGES for part in case.id.split("-")[1:] if part.isupper()}
    alike = {kind.replace("B" * kind.count("B"), "B") for kind in kinds if "B" in kind} | {*kinds}
    assert {"E", "EB", "EP", "EPB", "B", "BN", "NH", "H", "BNH", "EPBN", "PB"} <= alike


@pytest.mark.parametrize("case", layouts.CASES, ids=lambda case: case.id)
def test_same_curve(case, results, curve, worst_differences):
    recipe, expected = curve(case.recipe)
    got = results(case)
    found = compare(recipe, expected, got)
    worst_differences(case.id, {kind: worst(found, kind).off for kind in KINDS})
    wrong = [str(row) for row in found if row.too_far]
    assert not wrong, "\n".join(wrong)
    # The run really trains: runs that do nothing would also be equal.
    assert sum(got.losses[-5:]) < sum(got.losses[:5]) - 1
    assert min(got.norms) > 0
    if recipe.optimizer.clip is not None:  # otherwise Adam would hide gradients that are wrong by a constant factor
        assert {norm > recipe.optimizer.clip for norm in expected.norms} == {True, False}
