"""Learning rates that updates use, compared with tables computed by hand and with closed forms."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config.recipe.sections import ScheduleSection
from megagpt.engine.optim import lr_schedule

# warm-up of 3 in 10 updates, peak 1; DeepSpeed's default constructor would use 0 0 .333 .667 1 …
BY_HAND = {
    "warmup_decay": [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    "wsd": [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4],
    "warmup_cosine": [1 / 3, 2 / 3, 1] + [0.5 + 0.5 * math.cos(math.pi * k / 8) for k in range(1, 8)],
}


def used_rates(kind: str, total: int, warmup: int, min_lr: float = 0.0, peaks=(1.0,), steps=None):
    """Return the rate of each group at each update, read from the optimizer."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    section = ScheduleSection(
        type=kind, warmup_updates=warmup, min_lr=min_lr, decay_updates=3 if kind == "wsd" else None
    )
    scheduler = lr_schedule.build(section, optimizer, total, peaks[0])
    rates = []
    for _ in range(steps or total):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", BY_HAND)
def test_each_update_uses_the_rate_computed_by_hand(kind):
    assert [rate for (rate,) in used_rates(kind, 10, 3)] == pytest.approx(BY_HAND[kind], abs=1e-12)


def test_warmup_decay_without_a_floor_is_deepspeeds_own_class():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    built = lr_schedule.build(ScheduleSection(type="warmup_decay", warmup_updates=3), optimizer, 10, 1.0)
    assert type(built).__module__ == "deepspeed.runtime.lr_schedules"


@pytest.mark.parametrize("warmup", [0, 1])
def test_with_a_warm_up_of_at_most_one_update_training_starts_at_the_peak(warmup):
    assert used_rates("warmup_decay", 5, warmup)[0] == [1.0]


@pytest.mark.parametrize("kind", BY_HAND)
def test_every_group_follows_its_own_peak(kind):
    for one, other in used_rates(kind, 10, 3, peaks=(0.5, 0.02)):
        assert other == pytest.approx(one * 0.04)


@given(
    kind=st.sampled_from(list(BY_HAND)),
    total=st.integers(2, 200),
    fraction=st.floats(0, 1),
    floor=st.floats(0, 0.9),
)
def test_rates_stay_within_bounds_reach_the_peak_and_never_rise_again(kind, total, fraction, floor):
    warmup = int(fraction * (total - 1))
    section = ScheduleSection(
        type=kind, warmup_updates=warmup, min_lr=floor, decay_updates=3 if kind == "wsd" else None
    )
    factors = [lr_schedule.factor(section, n, total, floor) for n in range(1, total + 1)]
    after = factors[max(warmup, 1) - 1 :]
    assert min(factors) > 0
    assert max(factors) <= 1
    assert warmup == 0 or factors[warmup - 1] == 1
    assert all(a >= b for a, b in itertools.pairwise(after))
    assert all(value >= floor for value in after)
    assert [f == n / warmup for n, f in enumerate(factors[:warmup], 1)] == [True] * warmup


def test_the_rate_is_constant_after_the_last_update():
    rates = [rate for (rate,) in used_rates("warmup_cosine", 10, 2, min_lr=0.1, steps=14)]
    assert rates[9:] == [rates[9]] * 5
    assert rates[9] > 0.1
