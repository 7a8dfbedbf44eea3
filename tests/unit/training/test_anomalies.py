"""What is a spike, what is done about bad numbers, and that the record of a run is all that decides on it."""

import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.cluster import Collectives
from megagpt.config.recipe.sections import HealthSection
from megagpt.state import LossScale, UpdateResult
from megagpt.training.anomalies import Action, Health
from megagpt.training.metrics import Metrics

LOSSES = st.floats(0.5, 12)


def health(losses=(), norms=None, **section):
    result = Health(HealthSection(**section))
    for update, (loss, norm) in enumerate(zip(losses, norms or losses, strict=True), start=1):
        result.observe("update", update=update, loss=loss, grad_norm=norm)
    return result


def skipped(loss, scale=None):
    return UpdateResult(loss, math.inf, 1e-3, 100, made=False, scale=scale)


@given(st.lists(LOSSES, min_size=8, max_size=40), LOSSES, st.floats(0.1, 30))
def test_a_spike_is_so_many_normal_deviations_above_the_median_of_the_window(losses, loss, limit):
    recent = np.array(losses[-8:])
    middle = np.median(recent)
    deviation = max(np.median(np.abs(recent - middle)) / 0.6744897501960817, 1e-3 * middle)  # normal: 3/4 quantile
    off = (loss - middle) / deviation
    if abs(off - limit) > 1e-3:
        assert health(losses, loss_spike=limit, window=8).accepts(loss) == (off < limit)


def test_before_the_window_is_full_nothing_is_a_spike():
    assert health([3.0] * 7, loss_spike=5, window=8).accepts(100.0)
    assert not health([3.0] * 8, loss_spike=5, window=8).accepts(100.0)


@given(st.floats(2, 8), st.floats(0.9, 0.999), st.integers(0, 2**32 - 1))
def test_a_falling_loss_is_no_spike(first, factor, seed):
    noise = np.random.default_rng(seed).normal(1, 0.01, 64)
    losses = [float(value) for value in first * factor ** np.arange(64) * noise]
    assert health(losses[:-1], loss_spike=6, window=16).accepts(losses[-1])


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_accepted(loss):
    assert not health().accepts(loss)


def test_so_many_are_skipped_in_a_row_and_the_next_rolls_back():
    watched, actions = health(skips=2), []
    for position in (40, 44, 48):
        found = watched.check(10, skipped(math.nan))
        actions.append(found.action)
        watched.observe(found.action.value, update=10, position=position, samples=4)
    assert actions == [Action.SKIP, Action.SKIP, Action.ROLL_BACK]
    assert watched.next_position(40) == 52
    assert watched.check(10, skipped(math.nan)).action is Action.SKIP  # it begins anew


def test_a_good_update_ends_the_row():
    watched = health(skips=1)
    watched.observe("skip", update=10, position=40, samples=4)
    watched.observe("update", update=11, loss=3.0, grad_norm=1.0)
    assert watched.check(11, skipped(math.nan)).action is Action.SKIP


def test_only_a_dynamic_scale_and_a_good_loss_make_an_overflow():
    scale = LossScale(1024.0, 1.0)
    assert health().check(3, skipped(3.0, scale)).action is Action.RETRY
    assert health().check(3, skipped(math.nan, scale)).action is Action.SKIP
    assert health().check(3, skipped(3.0)).reason == "the gradient is not finite"


def test_a_spike_of_the_norm_rolls_back_though_the_update_is_made():
    watched = health([3.0, 3.1] * 4, [1.0, 1.1] * 4, norm_spike=5, window=8)
    assert watched.check(8, UpdateResult(3.0, 9.0, 1e-3, 100)).action is Action.ROLL_BACK
    assert watched.check(8, UpdateResult(99.0, 1.2, 1e-3, 100)) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(LOSSES, st.just(math.nan)), max_size=60), st.integers(0, 3), st.integers(1, 7))
def test_a_run_that_reads_its_record_again_decides_the_same(tmp_path_factory, losses, skips, every):
    """Updates, skips, rollbacks and checkpoints as a run makes them; the process may be another at any time."""
    folder, other = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("other")
    section = HealthSection(loss_spike=3, window=8, skips=skips)
    metrics = Metrics(folder, True, section.window)
    metrics.truncate(0)
    live, update, position, saved = Health(section), 0, 0, (0, 0)
    for loss in losses:
        shutil.copy(folder / "metrics.jsonl", other)
        again, record = Health(section), Metrics(other, True, section.window)
        record.truncate(update)
        record.close()
        again.replay(record.replayable, Collectives(1))
        position = live.next_position(position)
        assert again.next_position(position) == position
        made = live.accepts(loss)
        result = UpdateResult(loss, 1.0, 1e-3, 100, made=made)
        found = live.check(update, result)
        assert again.check(update, result) == found
        assert again.rollbacks == live.rollbacks
        if found is None:
            update, position = update + 1, position + 4
            values = {"update": update, "loss": loss, "grad_norm": 1.0, "position": position}
            metrics.write("update", **values)
            live.observe("update", **values)
            if update % every == 0:
                saved = (update, position)
                metrics.write("checkpoint", update=update)
                live.observe("checkpoint", update=update)
        elif found.action is Action.SKIP:
            metrics.write("skip", update=update, position=position, samples=4)
            live.observe("skip", update=update, position=position, samples=4)
        else:
            metrics.truncate(saved[0])
            values = {"update": saved[0], "position": position, "samples": 4}
            metrics.write("rollback", **values)
            update, position = saved
            live.replay(metrics.replayable, Collectives(1))
            live.observe("rollback", **values)
    metrics.close()


def test_decisions_outlive_the_updates_after_which_they_were_made(tmp_path):
    metrics = Metrics(tmp_path, True, 100)
    metrics.truncate(0)
    for update in range(1, 21):
        metrics.write("update", update=update, loss=3.0, grad_norm=1.0)
    metrics.write("skip", update=20, position=80, samples=4)
    metrics.close()
    record = Metrics(tmp_path, True, 100)
    record.truncate(10)  # resumed from an earlier checkpoint
    record.close()
    watched = Health(HealthSection())
    watched.replay(record.replayable, Collectives(1))
    assert watched.next_position(80) == 84
