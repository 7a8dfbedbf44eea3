"""`megagpt status` of a real run that is training, stopped, killed, failed by a user error, or complete."""

import contextlib
import os
import signal

from megagpt.training import status
from tests.faults.launches import launch
from tests.training import finish, ranks, wait_for_update


def test_status_follows_the_life_of_a_run(recipe):
    run = recipe.with_suffix("")
    with ranks(recipe, "length.updates=100000", world=2) as (first, second):
        wait_for_update(run, 2)
        assert status.read(run).state == "running"
        second.send_signal(signal.SIGTERM)
        assert [one.wait(timeout=240) for one in (first, second)] == [75, 75]
    assert status.read(run).state == "requeue"
    with ranks(recipe, "length.updates=100000") as (alone,):
        wait_for_update(run, 20)
        alone.kill()
        alone.wait()
        assert status.read(run).code == 1
    finish(recipe, "data.train=nowhere", code=2)
    assert status.read(run).code == 2
    finish(recipe)
    assert status.read(run).state == "done"
    (run / "DONE").unlink()  # as if it had been killed just after its last save
    assert status.read(run).code == 1
    finish(recipe)
    assert status.read(run).state == "done"


def test_no_rank_exits_with_75_before_rank_0_has_recorded_the_stop(recipe, tmp_path):
    slow = {"kind": "slow", "rank": 0, "method": "megagpt.training.status:StatusFile.end", "seconds": 1}
    with launch(recipe, "length.updates=100000", folder=tmp_path, faults=[slow]) as both:
        wait_for_update(recipe.with_suffix(""), 2)
        os.kill(both.pids()[1], signal.SIGUSR1)
        assert both.wait(120, all_but=[0])[1] == 75
        with contextlib.suppress(ProcessLookupError):  # it may have ended, too
            os.kill(both.pids()[0], signal.SIGKILL)  # as srun does if a rank exits with anything but 0
    assert status.read(recipe.with_suffix("")).state == "requeue"
