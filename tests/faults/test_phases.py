"""A fault on one of two ranks in each phase: all ranks end together, and the resumed run has the same bits."""

import re

import pytest

from tests import training
from tests.faults.launches import launch
from tests.training import curve, events, final_weights

# phase: update in which the fault occurs
PHASES = {"data": 6, "forward/backward": 12, "step": 18, "save": 25, "evaluate": 30}
OVERRIDES = (
    "length.updates=40",
    "checkpoint.every=5",
    "evaluation.every=10",
    "evaluation.samples=32",
    "log.every=1000",
)


def to_the_end(recipe, folder):
    with launch(recipe, *OVERRIDES, folder=folder) as ranks:
        assert ranks.wait(180) == [0, 0], ranks.printed()
    return recipe.with_suffix("")


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return to_the_end(training.write_recipe(folder / "run", data), folder)


def assert_same(run, straight):
    assert curve(run) == curve(straight)
    assert final_weights(run) == final_weights(straight)
    assert validations(run) == validations(straight)


def validations(run):
    return [(event["update"], event["loss"]) for event in events(run) if event["event"] == "validation"]


def newest(run):
    return int(sorted((run / "checkpoints").glob("update_*"))[-1].name.removeprefix("update_"))


def test_a_signal_to_one_rank_in_any_phase_stops_both_in_that_update_and_loses_nothing(recipe, straight, tmp_path):
    run = recipe.with_suffix("")
    clock = {"kind": "clock back", "name": "clock", "rank": 0, "update": 2, "seconds": 7200}  # which has no effect
    for (phase, update), number in zip(PHASES.items(), ("TERM", "USR1", "INT", "TERM", "USR1"), strict=True):
        signal = {"kind": "phase", "name": "signal", "rank": 1, "phase": phase, "update": update, "act": f"SIG{number}"}
        if phase == "evaluate":
            signal["nth"] = 3  # batches of 8
        with launch(recipe, *OVERRIDES, folder=tmp_path, faults=[signal, clock]) as ranks:
            assert ranks.wait(120) == [75, 75], ranks.printed()
            assert {fault["name"] for fault in ranks.fired()} == {"signal", "clock"}
            printed = ranks.printed()
        # The save of update 25 is completed, and the run stops after the next update.
        answered = update + 1 if phase == "save" else update
        assert f"Stopped by a signal to another rank; checkpoint saved at update {answered}." in printed
        assert newest(run) == curve(run)[-1]["update"] == answered
    left = [event["event"] for event in events(run) if event["update"] == 30]
    assert "validation_left" in left  # after 3 of 8 batches; no partial result is recorded
    assert "validation" not in left
    assert_same(to_the_end(recipe, tmp_path), straight)


def test_every_start_that_exits_with_75_makes_progress(recipe, tmp_path):
    """This holds for the shortest time limit. If signals prevent progress on several starts, the run is an error."""
    overrides, run = (
        ("evaluation.every=1", "evaluation.samples=32", "length.updates=2", "schedule.warmup_updates=1"),
        recipe.with_suffix(""),
    )

    def start(*more, faults=()):
        with launch(recipe, *overrides, *more, folder=tmp_path, faults=faults) as ranks:
            return ranks.wait(120), curve(run)[-1]["update"], validations(run), ranks.printed()

    codes, update, validated, _ = start("--max-minutes", "0")
    assert (codes, update, validated) == ([75, 75], 1, [])
    signal = {"kind": "phase", "name": "signal", "rank": 1, "phase": "evaluate", "update": 1, "act": "SIGTERM"}
    for vain in range(3):
        codes, update, validated, printed = start(faults=[{**signal, "nth": vain + 1}])
        assert (codes, update, validated) == ([75, 75], 1, []), printed
    codes, _, _, printed = start(faults=[signal])
    assert codes == [2, 2]
    assert printed.endswith(
        "megagpt: 3 starts got no further than the evaluation of update 1\n"
        "  this one was stopped by a signal to another rank\n"
        "  do: give the job more time, or lower evaluation.samples\n"
    )
    codes, update, validated, printed = start("--max-minutes", "0")
    assert (codes, update, len(validated)) == ([75, 75], 2, 1), printed
    codes, _, validated, _ = start("--max-minutes", "0")
    assert (codes, [update for update, _ in validated]) == ([0, 0], [1, 2])


def test_an_exception_in_any_phase_ends_both_ranks_and_names_rank_phase_and_cause(recipe, straight, tmp_path):
    for phase, update in PHASES.items():
        fault = {"kind": "phase", "name": "raise", "rank": 1, "phase": phase, "update": update, "act": "raise"}
        with launch(recipe, *OVERRIDES, folder=tmp_path, faults=[fault]) as ranks:
            assert ranks.wait(180) == [1, 1], ranks.printed()
            printed = ranks.printed(1)
        assert f"megagpt: rank 1 failed in {phase} of update {update}: Injected: made to fail in {phase}" in printed
    assert_same(to_the_end(recipe, tmp_path), straight)


# A save may take ten times the limit, since it waits for disks. When a rank is suspended, its last heartbeat is at most
# a second old, and after half of the limit without a heartbeat the rank is reported as silent.
@pytest.mark.parametrize(
    ("phase", "limit"), [("data", 6), ("forward/backward", 6), ("step", 6), ("evaluate", 6), ("save", 1)]
)
def test_a_suspended_rank_is_named_with_its_phase(recipe, phase, limit, tmp_path):
    fault = {"kind": "phase", "name": "stop", "rank": 1, "phase": phase, "update": 10, "act": "SIGSTOP", "seconds": 2}
    with launch(recipe, *OVERRIDES, f"log.hang_after={limit}", folder=tmp_path, faults=[fault]) as ranks:
        assert ranks.wait(120, all_but=[1]) == [1, None], ranks.printed()
        printed = ranks.printed()
    assert re.search(rf"\n  rank 1 on \S+: {phase} of update 10  silent for \d+ s: stopped or dead\n", printed), printed


# The longer limit of the first updates also applies to update 2: a hang is reported early, and the run ends later.
@pytest.mark.parametrize(
    ("config", "world", "rank", "phase", "update"),
    [("zero1", 2, 1, "forward/backward", 1), ("zero1", 2, 1, "data", 2), ("pipeline4-zero1", 4, 0, "step", 2)],
)
def test_a_hang_in_the_first_updates_is_reported_before_the_run_ends(
    recipe, config, world, rank, phase, update, tmp_path
):
    hang = {"kind": "phase", "name": "hang", "rank": rank, "phase": phase, "update": update, "act": "note"}
    overrides = ("log.hang_after=2", "model.n_layer=4", "batch.global_size=16")
    faults = [{**hang, "seconds": 1000}]
    with launch(recipe, *overrides, folder=tmp_path, world=world, config=config, faults=faults) as ranks:
        codes = ranks.wait(120, all_but=[rank])
        printed = "".join(ranks.printed(number) for number in range(world))
    assert 1 in codes, printed
    early, _, end = printed.partition("The first updates may compile; the run ends after 20 s without progress")
    assert re.search(rf"\n  rank {rank} on \S+: {phase} of update {update}\n", early), printed
    assert end, printed
    assert printed.count("has made no progress for") > 1  # early, and at the end
    for number in range(world):
        log = (recipe.with_suffix("") / f"logs/rank-{number}.log").read_text()
        assert "most recent call first" in log, log
