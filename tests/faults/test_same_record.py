"""metrics.jsonl has the same events with the same numbers on every layout, including a skipped update."""

import re

import pytest

from tests.faults.launches import launch
from tests.training import ROOT, events

WORDS = (
    "model.n_layer=3", "length.updates=26", "evaluation.every=6", "checkpoint.every=5", "checkpoint.keep_last=null",
    "health.loss_spike=5", "health.window=8", "log.every=1",
)  # fmt: skip
SPIKE = {
    "kind": "mislabel",
    "name": "spike",
    "positions": [96],
    "token": 100,
}  # update 25; a byte that the text has not
LAYOUTS = (("zero0", 1), ("zero0", 2), ("zero2", 2), ("zero3", 2), ("tensor2", 2), ("pipeline2", 2))
# durations, memory and host names
MEASURED = {
    "seconds", "data_seconds", "stall_seconds", "write_seconds", "tokens_per_second", "mfu", "device_bytes", "spent",
    "shares", "path", "time",
}  # fmt: skip
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")


def recorded(run):
    """Return the events from the first update on. Earlier ones describe the layout."""
    found = events(run)
    first = next(number for number, event in enumerate(found) if event["event"] == "update")
    return [{key: value for key, value in event.items() if key not in MEASURED} for event in found[first:]]


def close(value):
    return pytest.approx(value, rel=1e-4) if isinstance(value, float) else value


@pytest.fixture(scope="module")
def records(data, tmp_path_factory):
    """Record of each layout."""
    from tests import training

    found = {}
    for config, world in LAYOUTS:
        folder = tmp_path_factory.mktemp(config)
        recipe = training.write_recipe(folder / "run", data)
        with launch(recipe, *WORDS, folder=folder, world=world, config=config, faults=[SPIKE]) as ranks:
            assert ranks.wait(240) == [0] * world, ranks.printed()
            assert len(ranks.fired()) == world
        found[config, world] = recorded(folder / "run")
    return found


def test_the_spike_is_skipped_with_its_finite_loss(records):
    (skip,) = [event for event in records[LAYOUTS[0]] if event["event"] == "skip"]
    assert (skip["update"], skip["position"], skip["samples"]) == (24, 96, 4)
    assert re.match(r"the loss is \d+\.\d+, \d+\.\d deviations above ", skip["reason"])
    assert {"update", "validation", "checkpoint", "skip", "done"} <= {event["event"] for event in records[LAYOUTS[0]]}


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout_writes_the_same_record(records, layout):
    expected, found = records[LAYOUTS[0]], records[layout]
    assert [(event["event"], event["update"]) for event in found] == [(one["event"], one["update"]) for one in expected]
    for event, other in zip(found, expected, strict=True):
        assert event.keys() == other.keys()
        for key, value in event.items():
            if key == "reason":  # rounded in the message
                assert NUMBER.sub("#", value) == NUMBER.sub("#", other[key])
                numbers = [list(map(float, NUMBER.findall(text))) for text in (value, other[key])]
                assert numbers[0] == pytest.approx(numbers[1], rel=1e-2)
            else:
                assert value == close(other[key]), (event["event"], event["update"], key)


def test_the_quickstart_trains_with_the_shipped_pipeline_config(data, tmp_path):
    overrides = (
        f"run_dir={tmp_path / 'run'}", f"data.tokenizer={data}/text.model", f"data.train={data}/text.train",
        f"data.validation={data}/text.validation", "length.updates=4", "evaluation.samples=4", "evaluation.prompt=null",
        "schedule.warmup_updates=2", "batch.global_size=4", "model.seq_len=32",
    )  # fmt: skip
    recipe = ROOT / "launch/recipes/quickstart.yaml"
    with launch(recipe, *overrides, folder=tmp_path, world=4, config="pipeline4-zero1") as ranks:
        assert ranks.wait(240) == [0] * 4, ranks.printed()
    assert events(tmp_path / "run")[-1]["event"] == "done"
