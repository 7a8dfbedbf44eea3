"""Planned memory of Muon's step compared with all allocations of the step."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megagpt.engine.optim.muon import updates
from megagpt.plan.muon import iteration_bytes


@pytest.mark.parametrize(
    ("shape", "parts"),
    [((8, 96, 384), 1), ((8, 384, 96), 1), ((8, 128, 128), 1), ((4, 384, 128), 3), ((4, 128, 160), 1)],
)
def test_the_iteration_allocates_what_is_planned(shape, parts):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        directions = torch.ones(shape)
        updates(directions, parts)
    total = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    short, long = sorted((shape[1] // parts, shape[2]))
    assert iteration_bytes(directions.numel(), short, long) == pytest.approx(most, rel=0.02)
