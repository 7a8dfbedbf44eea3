"""`megagpt status` through the life of a real run: training, stopped, killed, mistaken, done."""

import signal

from megagpt.run import status
from tests.training import finish, ranks, wait_for_update


def test_a_run_that_lives_stops_dies_and_ends_is_told_as_such(recipe):
    run = recipe.with_suffix("")
    with ranks(recipe, world=2) as (first, second):
        wait_for_update(run, 2)
        assert status.read(run).state == "running"
        second.send_signal(signal.SIGTERM)
        assert [one.wait(timeout=120) for one in (first, second)] == [75, 75]
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
    (run / "DONE").unlink()  # as if it had been killed between its last save and this
    assert status.read(run).code == 1
    finish(recipe)
    assert status.read(run).state == "done"
