"""Which optimizer is built, its parameter groups, and where its step runs."""

from itertools import pairwise

import pytest
import torch
from deepspeed.ops import adam

from megagpt.config.recipe import PRESETS, ModelSection
from megagpt.config.recipe.sections import OptimizerSection
from megagpt.engine import offload
from megagpt.engine.optim import build
from megagpt.model import flops, gpt


@pytest.fixture
def model():
    return torch.nn.Linear(4, 2)


def test_on_a_gpu_deepspeeds_fused_adam_is_built_with_our_groups(model, monkeypatch):
    class Fused(torch.optim.AdamW):  # its operator takes minutes to build on a CPU
        def __init__(self, groups, *, adam_w_mode, betas, eps):
            assert adam_w_mode
            super().__init__(groups, betas=betas, eps=eps)

    loaded = []
    monkeypatch.setattr(adam, "FusedAdam", Fused)
    monkeypatch.setattr(build.deepspeed_ops, "load", loaded.append)
    built = build.build(OptimizerSection(lr=0.1, weight_decay=0.2), model, on_gpu=True)
    assert type(built) is Fused
    assert loaded == ["fused_adam"]
    assert [(group["lr"], group["weight_decay"]) for group in built.param_groups] == [(0.1, 0.2), (0.1, 0.0)]
    assert type(build.build(OptimizerSection(lr=0.1), model, on_gpu=False)) is torch.optim.AdamW
    assert loaded == ["fused_adam"]


def test_if_it_cannot_be_built_torchs_is_used_and_the_reason_is_logged(model, monkeypatch, caplog):
    def fail(name):
        raise OSError(f"no nvcc for {name}")

    monkeypatch.setattr(build.deepspeed_ops, "load", fail)
    assert type(build.build(OptimizerSection(lr=0.1), model, on_gpu=True)) is torch.optim.AdamW
    assert caplog.messages == [
        "DeepSpeed's fused Adam cannot be built (no nvcc for fused_adam); using torch's fused AdamW instead"
    ]


@pytest.mark.parametrize(("device", "offloaded_to", "on_gpu"), [
    ("cuda", None, True), ("cuda", "none", True), ("cuda", "cpu", False), ("cuda", "nvme", False), ("cpu", None, False),
])  # fmt: skip
def test_an_optimizer_steps_on_the_gpu_unless_it_is_offloaded(monkeypatch, device, offloaded_to, on_gpu):
    monkeypatch.setattr(offload.deepspeed_ops, "device", lambda: device)
    section = {} if offloaded_to is None else {"offload_optimizer": {"device": offloaded_to}}
    assert offload.steps_on_gpu({"zero_optimization": section}) is on_gpu


def stage_counts(blocks):
    """Return every number of stages that divides the blocks, and every small one."""
    dividing = [count for count in range(2, blocks + 1) if blocks % count == 0]
    return sorted({*dividing, *range(2, min(16, blocks) + 1)})


def kinds(groups):
    """Return parameter groups without their parameters, which differ from stage to stage."""
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


@pytest.mark.parametrize("type", ["adamw", "muon"])
@pytest.mark.parametrize("preset", PRESETS)
def test_groups_of_every_stage_are_those_of_the_whole_model_in_its_order(preset, type):
    section = ModelSection(**{"vocab_size": 32_000, "seq_len": 1024, **PRESETS[preset]})
    settings = OptimizerSection(type=type, lr=0.1, muon_lr=0.2, muon_momentum=0.95)
    with torch.device("meta"):
        layers = gpt.build_layers(section)
    whole = kinds(build._parameter_groups(settings, torch.nn.ModuleList(layers)))
    assert len(whole) == (4 if type == "muon" else 2)
    for count in stage_counts(section.n_layer):
        cuts = flops.boundaries(flops.layer_costs(section), count)
        for first, last in pairwise(cuts):
            local = layers[first:last]
            if section.tie_embeddings and last == len(layers):
                local = [layers[0], *local]
            groups = build._parameter_groups(settings, torch.nn.ModuleList(local))
            positions = [whole.index(kind) for kind in kinds(groups)]
            assert positions == sorted(set(positions))
            assert all(group["params"] for group in groups)
            assert (groups[0]["lr"], "muon" in groups[0]) == (0.1, False)  # its rate is logged
