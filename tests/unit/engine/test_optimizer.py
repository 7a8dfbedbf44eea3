"""Which optimizer steps where."""

import pytest
import torch
from deepspeed.ops import adam

from megagpt.engine import offload, optimizer
from megagpt.recipe.sections import OptimizerSection


@pytest.fixture
def model():
    return torch.nn.Linear(4, 2)


def test_on_a_gpu_deepspeeds_fused_adam_is_taken_with_our_groups(model, monkeypatch):
    class Fused(torch.optim.AdamW):  # its operator takes minutes to build on a CPU
        def __init__(self, groups, *, adam_w_mode, betas, eps):
            assert adam_w_mode
            super().__init__(groups, betas=betas, eps=eps)

    loaded = []
    monkeypatch.setattr(adam, "FusedAdam", Fused)
    monkeypatch.setattr(optimizer.operators, "load", loaded.append)
    built = optimizer.build(OptimizerSection(lr=0.1, weight_decay=0.2), model, on_gpu=True)
    assert type(built) is Fused
    assert loaded == ["fused_adam"]
    assert [(group["lr"], group["weight_decay"]) for group in built.param_groups] == [(0.1, 0.2), (0.1, 0.0)]
    assert type(optimizer.build(OptimizerSection(lr=0.1), model, on_gpu=False)) is torch.optim.AdamW
    assert loaded == ["fused_adam"]


def test_where_it_cannot_be_built_torchs_takes_its_place_and_the_log_says_why(model, monkeypatch, caplog):
    def fail(name):
        raise OSError(f"no nvcc for {name}")

    monkeypatch.setattr(optimizer.operators, "load", fail)
    assert type(optimizer.build(OptimizerSection(lr=0.1), model, on_gpu=True)) is torch.optim.AdamW
    assert caplog.messages == [
        "DeepSpeed's fused Adam cannot be built (no nvcc for fused_adam); torch's fused AdamW takes its place"
    ]


@pytest.mark.parametrize(("device", "place", "there"), [
    ("cuda", None, True), ("cuda", "none", True), ("cuda", "cpu", False), ("cuda", "nvme", False), ("cpu", None, False),
])  # fmt: skip
def test_an_optimizer_steps_on_the_gpu_unless_it_is_offloaded(monkeypatch, device, place, there):
    monkeypatch.setattr(offload.operators, "device", lambda: device)
    section = {} if place is None else {"offload_optimizer": {"device": place}}
    assert offload.steps_on_gpu({"zero_optimization": section}) is there
