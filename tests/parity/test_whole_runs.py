"""`megagpt train` with the same recipe gives the same record and weights on layouts of every family."""

import numpy as np
import pytest

from tests import training

SHORT = ("length.updates=20", "evaluation.every=10", "evaluation.prompt=the of", "checkpoint.every=20")
LAYOUTS = {"zero3-offload": 2, "pipeline2": 2, "tensor2": 2, "ulysses2-zero3": 2, "3d": 4}


@pytest.fixture(scope="session")
def one_rank(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("one") / "run"
    training.finish(training.write_recipe(run, data), *SHORT)
    return run


def validations(run):
    return [event["loss"] for event in training.events(run) if event["event"] == "validation"]


@pytest.mark.parametrize("config", LAYOUTS)
def test_a_run_leaves_the_same_record_on_every_layout(recipe, one_rank, config):
    printed = training.finish(recipe, *SHORT, world=LAYOUTS[config], config=config)
    run = recipe.with_suffix("")
    for ours, theirs in zip(training.curve(run), training.curve(one_rank), strict=True):
        for key in ("update", "tokens", "position", "lr"):
            assert ours[key] == theirs[key]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert printed.count("     sample  the of") == 2
    assert len(validations(run)) == 2
    assert validations(run) == pytest.approx(validations(one_rank), rel=1e-5)
    weights, expected = training.named_weights(run), training.named_weights(one_rank)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert np.linalg.norm(weights[name] - value) <= 1e-3 * np.linalg.norm(value), name
