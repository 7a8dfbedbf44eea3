"""A branch of another run, as for a cool-down, equals a run that had its schedule from the start, bit for bit."""

import pytest

from megagpt.checkpoint import resume
from megagpt.checkpoint.store import Store
from megagpt.errors import UserError
from tests import protocol, training
from tests.faults.launches import launch
from tests.training import curve, events, final_weights

WSD = ("schedule.type=wsd", "log.every=1000", "evaluation.every=30")
TRUNK = (*WSD, "schedule.decay_updates=5", "length.updates=60", "checkpoint.keep_last=null")
COOL_DOWN = (*WSD, "schedule.decay_updates=20", "length.updates=60")


def test_a_cool_down_branched_from_a_longer_run_equals_a_separate_run_bit_for_bit(data, tmp_path):
    def train(name, *overrides, code=0):
        recipe = training.write_recipe(tmp_path / name, data)
        with launch(recipe, *overrides, folder=tmp_path) as ranks:
            assert set(ranks.wait(120)) == {code}, ranks.printed()
            return ranks.printed()

    train("trunk", *TRUNK)
    train("straight", *COOL_DOWN)
    begin = f"init_from={tmp_path}/trunk@40"
    printed = train("branch", *COOL_DOWN, begin, "--max-minutes", "0", code=75)
    assert f"branched from {tmp_path}/trunk@40" in printed
    assert "note     changed: schedule.decay_updates  5 then, 20 now\n" in printed
    assert events(tmp_path / "branch")[0]["event"] == "branch"
    assert "resumed  at update 41," in train("branch", *COOL_DOWN, begin)  # from now on from its own checkpoints
    assert curve(tmp_path / "branch") == curve(tmp_path / "straight")[40:]
    assert final_weights(tmp_path / "branch") == final_weights(tmp_path / "straight")
    assert curve(tmp_path / "straight") != curve(tmp_path / "trunk")

    printed = train("other", *COOL_DOWN, begin, "model.n_layer=1", code=2)
    assert "model.n_layer  2 then, 1 now" in printed
    assert "schedule.decay_updates" not in printed


@pytest.fixture
def trunk(tmp_path):
    for update in (10, 20, 30):
        protocol.save(tmp_path / "trunk", update)
    return tmp_path / "trunk"


def branch(trunk, at, total=100, run="branch"):
    return resume.find_branch_point(f"{trunk}@{at}", "recipe.yaml:1  init_from", Store(trunk.parent / run), total)


@pytest.mark.parametrize(("at", "update"), [("20", 20), ("latest", 30)])
def test_an_update_or_the_latest_is_found(trunk, at, update):
    assert branch(trunk, at).state == protocol.state_of(update)


@pytest.mark.parametrize(
    ("at", "more", "message"),
    [
        (
            "15",
            {},
            "has no checkpoint of update 15\n  recipe.yaml:1  init_from\n  do: choose one of 10, 20, 30, or latest",
        ),
        ("30", {"total": 30}, "the branch begins at update 30, and the length is only 30 updates"),
        ("30", {"run": "trunk"}, "a run cannot begin with itself"),
    ],
)
def test_an_impossible_branch_is_an_error(trunk, at, more, message):
    with pytest.raises(UserError) as error:
        branch(trunk, at, **more)
    assert message in str(error.value)


def test_a_branch_of_a_missing_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"there is no run with a checkpoint in .*nowhere"):
        branch(tmp_path / "nowhere", "10")


def test_a_branch_never_starts_from_a_damaged_checkpoint(trunk):
    file = trunk / "checkpoints/update_00000030/deep/moments-0"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="moments-0 is damaged: its checksum differs"):
        branch(trunk, "30")
    assert branch(trunk, "latest").state.update == 20
