"""Time breakdown of a run: each second is counted once, by what it was used for, across all restarts."""

import time

import pytest

from megagpt.training import metrics, time_breakdown
from tests.faults.launches import launch
from tests.training import events

OVERRIDES = ("length.updates=20", "checkpoint.every=5", "evaluation.every=5")
EACH = ("length.updates=6", "schedule.warmup_updates=2", "checkpoint.every=1", "evaluation.every=1")
SLOW = {
    "data": "megagpt.data.loader:Loader.batches",
    "compute": "megagpt.engine.zero:ZeroEngine.train_update",
    "save": "megagpt.engine.zero:ZeroEngine.save_state",
    "evaluate": "megagpt.engine.zero:ZeroEngine.evaluate",
}


@pytest.mark.parametrize("part", SLOW)
def test_slow_parts_appear_in_the_time_breakdown(recipe, part, tmp_path):
    faults = [{"kind": "begun"}, {"kind": "slow", "method": SLOW[part], "seconds": 1.0}]
    with launch(recipe, *EACH, folder=tmp_path, world=1, faults=faults) as ranks:
        assert ranks.wait(120) == [0]
        begun, end = ranks.fired()[0]["at"], time.monotonic()
        printed = next(line for line in ranks.printed().splitlines() if line.startswith("time     "))
    spent = metrics.time_breakdown(tmp_path / "run")
    assert sum(spent.fractions.values()) == pytest.approx(1)
    assert max((share, name) for name, share in spent.fractions.items() if name != "startup")[1] == part
    assert getattr(spent, part) > 6 * 1.0
    assert 0.8 * (end - begun) < spent.total < end - ranks.started  # does not include shutdown after the last event
    assert f"{part} {spent.fractions[part]:.1%}"[:-2] in printed


def test_work_lost_to_a_kill_is_counted(recipe, tmp_path):
    slow = {"kind": "slow", "method": SLOW["compute"], "seconds": 0.2}
    kill = {"kind": "phase", "name": "kill", "phase": "step", "update": 9, "act": "SIGKILL"}
    for faults, code in (([slow, kill], -9), ([slow], 0)):
        with launch(recipe, *OVERRIDES, folder=tmp_path, world=1, faults=faults) as ranks:
            assert ranks.wait(120) == [code]
    spent = metrics.time_breakdown(tmp_path / "run")
    assert spent.lost_work > 3 * 0.2  # updates 6 to 8
    assert spent.lost_work + spent.compute > 23 * 0.2
    assert [event["update"] for event in events(tmp_path / "run") if event["event"] == "update"] == list(range(1, 21))


def test_each_event_counts_once():
    events = [
        {"event": "start", "seconds": 10.0, "lost_seconds": 0.0},
        {"event": "update", "seconds": 2.0, "data_seconds": 0.5},
        {"event": "checkpoint", "stall_seconds": 1.0, "write_seconds": 30.0},
        {"event": "validation", "seconds": 4.0},
        {"event": "validation_left", "seconds": 1.0},
        {"event": "resume", "seconds": 7.0, "lost_seconds": 3.0},
        {"event": "rollback", "seconds": 0.5, "lost_seconds": 6.0},
        {"event": "skip", "seconds": 0.25},
        {"event": "time", "spent": {}},
    ]
    spent = time_breakdown.add_up(events)
    assert spent == time_breakdown.TimeBreakdown(
        data=0.5, compute=1.5, save=1.0, evaluate=5.0, startup=17.0, lost_work=9.75
    )
    assert str(spent).startswith("35s: startup 48.9%, lost work 28.1%, evaluate 14.4%")
