"""The ZeRO engine in one process compared with a plain PyTorch loop: loss, norm, weights, evaluation, state."""

import copy

import pytest
import torch
from deepspeed.accelerator import get_accelerator

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
precision: fp32
model: {n_layer: 2, n_head: 2, d_model: 32, vocab_size: 64, seq_len: 16, tie_embeddings: %s}
data: {train: none}
batch: {global_size: 6}
optimizer: {type: adamw, lr: 1.0e-3, betas: [0.9, 0.95], weight_decay: 0.1, clip: %s}
schedule: {type: warmup_decay, warmup_updates: 2}
length: {updates: 8}
"""
RATES = [0.5, 1.0, 6 / 7, 5 / 7]  # fractions of the peak in updates 1 to 4 of 8 after a warm-up of 2, computed by hand


@pytest.fixture
def make(tmp_path, collectives):
    def engine(stage, micro=2, tied="true", clip="0.5"):
        path = tmp_path / "r.yaml"
        path.write_text(RECIPE % (tied, clip))
        (tmp_path / "d.json").write_text(
            f'{{"train_micro_batch_size_per_gpu": {micro}, "zero_optimization": {{"stage": {stage}}}}}'
        )
        resolved = ds_config.load(tmp_path / "d.json", recipe.load(path), 1, deepspeed_keys.known_keys())
        return build.build(resolved, 8, Rank(), collectives), resolved.recipe

    return engine


def global_batch(seed):
    """Return six samples of 16 tokens, of which 16, 13, 10, … have valid labels."""
    ids = torch.randint(0, 64, (6, 17), generator=torch.Generator().manual_seed(seed))
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].clone()
    for row in range(6):
        labels[row, 16 - 3 * row :] = -100
    return Batch(inputs, labels)


def split(batch, micro):
    return [Batch(*parts) for parts in zip(*(tensor.split(micro) for tensor in batch), strict=True)]


def plain(section, updates, clip):
    """Return losses, norms before clipping, and weights of a plain loop over the same global batches, unsplit."""
    model = GPT(section)
    initialize(model, 3)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=False, foreach=False)
    losses, norms = [], []
    for update in range(updates):
        inputs, labels = global_batch(update)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * RATES[update]
        logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, dict(model.named_parameters())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("micro", "tied", "clip"), [(6, "true", 0.5), (2, "false", 0.5), (1, "true", 1.0e9)])
def test_every_stage_trains_like_plain_pytorch(make, stage, micro, tied, clip):
    engine, recipe_used = make(stage, micro, tied, str(clip))
    losses, norms, expected = plain(recipe_used.model, 4, clip)
    results = [engine.train_update(split(global_batch(update), micro)) for update in range(4)]
    assert [r.loss for r in results] == pytest.approx(losses, rel=1e-5)
    assert [r.grad_norm for r in results] == pytest.approx(norms, rel=1e-5)
    assert [r.lr for r in results] == pytest.approx([1e-3 * rate for rate in RATES])
    assert [r.tokens for r in results] == [51] * 4  # 16 + 13 + 10 + 7 + 4 + 1
    assert norms[0] > 0.5  # clipping at 0.5 has an effect
    weights = dict(engine.weights())
    assert weights.keys() == expected.keys()
    start_weights = GPT(recipe_used.model)
    initialize(start_weights, 3)
    for name, before in start_weights.named_parameters():
        if name.endswith("qkv.bias"):
            continue  # the keys' third of it has a zero gradient, so that AdamW amplifies rounding errors
        moved = (expected[name] - before).norm()
        assert (weights[name] - expected[name]).norm() <= 1e-4 * moved, name


def test_evaluation_is_the_mean_over_valid_tokens_and_changes_nothing(make):
    engine, recipe_used = make(0)
    model = GPT(recipe_used.model)
    initialize(model, 3)
    inputs, labels = global_batch(9)
    expected = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten())
    before = {name: tensor.clone() for name, tensor in engine.weights()}
    assert engine.evaluate(split(Batch(inputs, labels), 2)) == pytest.approx(expected.item(), rel=1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.weights())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_restored_engine_continues_bit_for_bit(make, stage, tmp_path):
    engine, _ = make(stage)
    for update in range(2):
        engine.train_update(split(global_batch(update), 2))
    (tmp_path / "saved").mkdir()
    engine.save_state(folder_writer(tmp_path / "saved"))
    straight = [engine.train_update(split(global_batch(update), 2)) for update in (2, 3)]
    kept = {name: copy.deepcopy(tensor) for name, tensor in engine.weights()}
    other, _ = make(stage)
    other.load_state(tmp_path / "saved")
    assert [other.train_update(split(global_batch(update), 2)) for update in (2, 3)] == straight
    assert all(torch.equal(kept[name], tensor) for name, tensor in other.weights())


def test_an_update_without_valid_labels_has_a_loss_of_zero_and_no_nan(make):
    engine, _ = make(0)
    inputs, labels = global_batch(0)
    result = engine.train_update(split(Batch(inputs, torch.full_like(labels, -100)), 2))
    assert (result.loss, result.tokens, result.grad_norm) == (0.0, 0, 0.0)


def test_at_stage_3_fp32_stays_fp32_on_devices_without_fp16(make, monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    engine, _ = make(3)
    kept = {parameter.ds_tensor.dtype for parameter in engine._engine.module.parameters()}
    engine.release()
    assert kept == {torch.float32}
