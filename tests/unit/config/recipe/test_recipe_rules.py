"""Rules between recipe keys: each row has the edit that breaks one and the complete error message."""

from __future__ import annotations

import pytest

from megagpt.errors import UserError

BROKEN = {
    "width not divisible by heads": (
        {3: "model: {preset: gpt2-124m, n_head: 7}"},
        "megagpt: model.d_model is not a multiple of model.n_head\n  model.d_model  768   preset gpt2-124m\n"
        "  model.n_head   7     r.yaml:3\n  do: set model.d_model to 763 or 770",
    ),
    "heads not divisible by key heads": (
        {3: "model: {preset: gpt2-124m, n_kv_head: 5}"},
        "megagpt: model.n_head is not a multiple of model.n_kv_head\n  model.n_head     12   preset gpt2-124m\n"
        "  model.n_kv_head  5    r.yaml:3\n  do: set model.n_kv_head to 1, 2, 3, 4, 6 or 12",
    ),
    "odd head dimension with rotary positions": (
        {3: "model: {preset: gpt2-124m, n_head: 256, position: rope}"},
        "megagpt: position: rope rotates pairs of elements, but the head dimension 3 is odd\n"
        "  model.d_model   768      preset gpt2-124m\n  model.n_head    256      r.yaml:3\n"
        '  model.position  "rope"   r.yaml:3\n  do: set model.d_model to a multiple of 512',
    ),
    "no length": (
        {8: "length: {updates: null}"},
        "megagpt: the length of training is missing\n  r.yaml:8  length.updates\n"
        "  do: give one of length.updates, length.tokens and length.epochs",
    ),
    "two lengths": (
        {8: "length: {updates: 100, epochs: 2}"},
        "megagpt: the length of training is given more than once\n  length.updates  100   r.yaml:8\n"
        "  length.epochs   2     r.yaml:8\n  do: keep one and set the other to null: length.epochs=null",
    ),
    "a branch of no update": (
        {1: "run_dir: r\ninit_from: runs/trunk"},
        'megagpt: init_from: "runs/trunk" does not name an update of a run\n  r.yaml:2  init_from\n'
        "  do: write RUN_DIRECTORY@UPDATE, or RUN_DIRECTORY@latest",
    ),
    "wsd without a decay": (
        {7: "schedule: {type: wsd, warmup_updates: 10}"},
        "megagpt: schedule.type wsd needs schedule.decay_updates\n  r.yaml:7  schedule.type\n"
        "  do: give the number of updates of the decay at the end",
    ),
    "a decay without wsd": (
        {7: "schedule: {warmup_updates: 10, decay_updates: 5}"},
        "megagpt: schedule.decay_updates is for wsd only\n"
        '  schedule.type           "warmup_decay"   default\n  schedule.decay_updates  5                r.yaml:7\n'
        "  do: remove it, or set schedule.type to wsd",
    ),
    "warm-up longer than training": (
        {7: "schedule: {warmup_updates: 100}"},
        "megagpt: schedule.warmup_updates is not less than the length of 100 updates\n"
        "  schedule.warmup_updates  100   r.yaml:7\n  length.updates           100   r.yaml:8\n"
        "  do: warm up for fewer updates, or train longer; 1 to 5 % of the length is usual",
    ),
    "warm-up and decay longer than training": (
        {7: "schedule: {type: wsd, warmup_updates: 60, decay_updates: 50}"},
        "megagpt: warm-up and decay together are longer than the 100 updates of training\n"
        "  schedule.warmup_updates  60    r.yaml:7\n  schedule.decay_updates   50    r.yaml:7\n"
        "  length.updates           100   r.yaml:8\n  do: shorten one of them, or train longer",
    ),
    "final learning rate above the peak": (
        {7: "schedule: {warmup_updates: 10, min_lr: 1.0e-3}"},
        "megagpt: schedule.min_lr is not less than optimizer.lr\n  schedule.min_lr  0.001    r.yaml:7\n"
        "  optimizer.lr     6.0e-4   r.yaml:6\n"
        "  do: lower schedule.min_lr; 0 or a tenth of the peak is usual",
    ),
    "muon without its learning rate": (
        {6: "optimizer: {type: muon, lr: 1e-3}"},
        "megagpt: optimizer.type muon needs optimizer.muon_lr\n  r.yaml:6  optimizer.type\n"
        "  do: give the peak learning rate of the block matrices, often 0.02",
    ),
    "muon's keys without muon": (
        {6: "optimizer: {lr: 1e-3, muon_lr: 0.02, muon_momentum: 0.9}"},
        'megagpt: optimizer.muon_lr is for muon only\n  optimizer.type     "adamw"   default\n'
        "  optimizer.muon_lr  0.02      r.yaml:6\n  do: remove it, or set optimizer.type to muon\n"
        'megagpt: optimizer.muon_momentum is for muon only\n  optimizer.type           "adamw"   default\n'
        "  optimizer.muon_momentum  0.9       r.yaml:6\n  do: remove it, or set optimizer.type to muon",
    ),
}


@pytest.mark.parametrize(("lines", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_rule_is_reported_with_all_values_and_locations(loader, lines, message):
    with pytest.raises(UserError) as caught:
        loader(lines)
    assert str(caught.value) == message
