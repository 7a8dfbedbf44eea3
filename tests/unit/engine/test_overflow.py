"""Dynamic loss scale of fp16, compared attempt by attempt with a plain loop that applies the rule itself."""

import json

import pytest
import torch

from megagpt.cluster import Rank
from megagpt.config import deepspeed as ds_config
from megagpt.config import recipe
from megagpt.data.loader import Batch
from megagpt.engine import build, deepspeed_keys
from megagpt.files import folder_writer
from megagpt.model.gpt import GPT, initialize

RECIPE = """\
run_dir: runs/none
seed: 3
precision: fp16
model: {n_layer: 2, n_head: 2, d_model: 32, vocab_size: 64, seq_len: 16}
data: {train: none}
batch: {global_size: 6}
optimizer: {type: adamw, lr: 1.0e-3, betas: [0.9, 0.95], weight_decay: 0.1, clip: 0.5}
schedule: {type: warmup_decay, warmup_updates: 2}
length: {updates: 30}
"""
POWER, HYSTERESIS, WINDOW, UPDATES = (
    30,
    2,
    5,
    16,
)  # the scale starts at 2^30 and doubles after 5 updates without overflow


@pytest.fixture
def make(tmp_path, collectives, fp16):
    def engine(stage):
        (tmp_path / "r.yaml").write_text(RECIPE)
        scale = {"initial_scale_power": POWER, "hysteresis": HYSTERESIS, "loss_scale_window": WINDOW}
        (tmp_path / "d.json").write_text(json.dumps({"zero_optimization": {"stage": stage}, "fp16": scale}))
        resolved = ds_config.load(tmp_path / "d.json", recipe.load(tmp_path / "r.yaml"), 1, deepspeed_keys.known_keys())
        return build.build(resolved, 30, Rank(), collectives), resolved.recipe

    return engine


def global_batch(update):
    ids = torch.randint(0, 64, (6, 17), generator=torch.Generator().manual_seed(update))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def plain(section):
    """Return (update, scale, made, loss) of each attempt of a plain loop with fp32 master weights."""
    model = GPT(section)
    initialize(model, 3)
    model.half()
    masters = [parameter.detach().float() for parameter in model.parameters()]
    groups = [{"params": [p for p in masters if p.ndim > 1], "weight_decay": 0.1}]
    groups += [{"params": [p for p in masters if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=False)
    attempts, update, scale, patience, good = [], 0, 2.0**POWER, HYSTERESIS, 0
    while update < UPDATES:
        inputs, labels = global_batch(update)
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs).logits.float().flatten(0, 1), labels.flatten())
        (loss * scale).backward()
        made = all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
        attempts.append((update, scale, made, loss.item()))
        if not made:
            patience, scale, good = max(patience - 1, 1), scale / (2 if patience == 1 else 1), 0
            continue
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = parameter.grad.float() / scale
        torch.nn.utils.clip_grad_norm_(masters, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min((update + 1) / 2, (30 - update) / 29)
        optimizer.step()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            parameter.data.copy_(master)
        update, good = update + 1, good + 1
        if good > 1 and (good - 1) % WINDOW == 0:
            patience, scale = HYSTERESIS, scale * 2
    return attempts


def train(engine, updates):
    """Return the attempts and the results of an engine."""
    attempts, results = [], []
    for update in updates:
        while True:
            result = engine.train_update([global_batch(update)])
            attempts.append((update, result.scale.value, result.made, result.loss))
            if result.made:
                break
        results.append(result)
    return attempts, results


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_update_that_overflows_is_repeated_at_the_scale_of_the_rule(make, stage):
    engine, recipe_used = make(stage)
    expected = plain(recipe_used.model)
    attempts, results = train(engine, range(UPDATES))
    engine.release()
    assert [attempt[:3] for attempt in attempts] == [attempt[:3] for attempt in expected]
    assert [attempt[3] for attempt in attempts] == pytest.approx([attempt[3] for attempt in expected], rel=2e-4)
    overflows = [update for update, _, made, _ in attempts if not made]
    assert overflows.count(0) > 3
    assert set(overflows) > {0}  # the scale has grown too large again
    rates = [1e-3 * min((update + 1) / 2, (30 - update) / 29) for update in range(UPDATES)]
    assert [result.lr for result in results] == pytest.approx(rates)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_restored_scale_continues_as_if_not_interrupted(make, stage, tmp_path):
    engine, _ = make(stage)
    train(engine, range(8))
    (tmp_path / "saved").mkdir()
    engine.save_state(folder_writer(tmp_path / "saved"))
    straight = train(engine, range(8, UPDATES))
    engine.release()
    other, _ = make(stage)
    other.load_state(tmp_path / "saved")
    assert train(other, range(8, UPDATES)) == straight
    other.release()
    assert {made for _, _, made, _ in straight[0]} == {True, False}
