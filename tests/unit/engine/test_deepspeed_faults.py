"""Faults of DeepSpeed that engine/ goes round. A test that fails here says that the way round can go."""

import os
import subprocess
import sys

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.lr_schedules import WarmupDecayLR
from deepspeed.runtime.utils import get_global_norm_of_tensors
from deepspeed.utils import safe_get_full_optimizer_state

from megagpt.cluster import free_port
from megagpt.engine import deepspeed_patches, grad_norm

pytestmark = pytest.mark.usefixtures("collectives")


def test_in_bf16_a_parameter_used_in_loss_fn_is_not_trained():
    """Why Stages makes the loss inside its last layer: all gradients are cleared when backward reaches its output."""
    head = torch.nn.Linear(4, 4)

    class Passes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, x):
            return x

    pipe = PipelineModule(
        [torch.nn.Linear(4, 4), Passes()],
        num_stages=1,
        loss_fn=lambda out, labels: (head(out) - labels).float().square().mean(),
    )
    before = {name: parameter.detach().clone() for name, parameter in pipe.named_parameters()}
    engine = deepspeed.initialize(
        model=pipe,
        optimizer=torch.optim.AdamW(pipe.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        },
        dist_init_required=False,
    )[0]
    engine.train_batch(iter([(torch.ones(2, 4).bfloat16(), torch.zeros(2, 4).bfloat16())]))
    moved = {name: (parameter.float() - before[name]).abs().max().item() for name, parameter in pipe.named_parameters()}
    deepspeed_patches.release(engine)
    assert moved["0.weight"] > 0.05
    assert moved["1.head.bias"] < 0.01  # its gradient is far from 0


def zero(stage, groups=1, offload=None, **config):
    """An engine on two linear layers, each in a parameter group of its own if there are two."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 1, bias=False))
    parameters = list(model.parameters())
    parts = [parameters] if groups == 1 else [[parameter] for parameter in parameters]
    return deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([{"params": part} for part in parts], lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage, **({"offload_optimizer": {"device": offload}} if offload else {})},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **config,
        },
        dist_init_required=False,
    )[0]


def test_at_stage_0_there_is_no_gradient_norm():
    """Why ZeroEngine clips by itself there."""
    engine = zero(0)
    engine.backward(engine(torch.ones(2, 4)).mean())
    engine.step()
    norm = engine.get_global_grad_norm()
    deepspeed_patches.release(engine)
    assert norm is None


def test_at_stage_0_a_gradient_is_divided_by_the_accumulation_though_told_not_to():
    """Why ZeroEngine lets DeepSpeed scale: its hook sits on the very tensor that the model returned."""

    def gradient(accumulation):
        engine = zero(0, gradient_accumulation_steps=accumulation)
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.fill_(0.5)
        engine.module.register_forward_hook(lambda _, inputs, output: output.mean())
        engine.backward(engine(torch.ones(2, 4)), scale_wrt_gas=False)
        value = engine.module[0].weight.grad.clone()
        deepspeed_patches.release(engine)
        return value

    assert torch.equal(gradient(4), gradient(1) / 4)


def test_with_two_parameter_groups_the_moments_of_the_second_are_not_found():
    """Why moments are read from the optimizer itself: DeepSpeed links all groups when the first has stepped."""
    engine = zero(1, groups=2)
    engine.backward(engine(torch.ones(2, 4)).mean())
    engine.step()
    first, second = engine.module.parameters()
    found = safe_get_full_optimizer_state(first, "exp_avg")
    with pytest.raises(ValueError, match="exp_avg not found"):
        safe_get_full_optimizer_state(second, "exp_avg")
    deepspeed_patches.release(engine)
    assert found.abs().max() > 0


def test_in_bf16_stage_0_steps_before_training_begins():
    """Why bf16 never runs at stage 0: an update on zero gradients counts, and decays the weights."""
    engine = zero(0, bf16={"enabled": True})
    steps = {int(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    deepspeed_patches.release(engine)
    assert steps == {1}


def test_in_bf16_with_offload_a_bad_gradient_stays_for_ever():
    """Why a gradient that was not stepped on is thrown away by us."""
    config = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine = zero(2, offload="cpu", **config)
    stepped = []
    for factor in (float("nan"), 1.0):
        engine.backward(engine(torch.ones(2, 4).bfloat16()).float().mean() * factor)
        engine.step()
        stepped.append(engine.was_step_applied())
    deepspeed_patches.release(engine)
    assert stepped == [False, False]


@pytest.mark.parametrize("stage", [1, 3])
def test_in_fp16_an_update_that_doubles_the_scale_uses_half_its_gradient(fp16, stage):
    """Why loss_scale.ready has it change it after the step."""

    def first_moment(window):
        torch.manual_seed(0)
        scaled = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": window}
        engine = zero(stage, fp16=scaled, gradient_clipping=0.0)
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0  # the same gradient twice
        for _ in range(2):
            engine.backward(engine(torch.ones(2, 4).half()).mean())
            engine.step()
        moments = [state["exp_avg"].clone() for state in engine.optimizer.optimizer.state.values()]
        deepspeed_patches.release(engine)
        return torch.cat([moment.flatten() for moment in moments])

    doubled, constant = first_moment(window=1), first_moment(window=1000)
    assert constant.abs().max() > 0
    torch.testing.assert_close(doubled / constant, torch.full_like(constant, (0.9 + 0.5) / (0.9 + 1.0)))


def test_a_dtype_given_to_zero_init_is_taken_for_bf16_where_there_is_no_fp16(monkeypatch):
    """Why stage 3 lets zero.Init read precision from the config: fp32 would train in bf16 on most CPUs."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with deepspeed.zero.Init(dtype=torch.float32):
        layer = torch.nn.Linear(4, 4)
    assert layer.weight.ds_tensor.dtype == torch.bfloat16


def test_the_first_two_updates_of_deepspeeds_warmup_have_the_rate_0():
    """Why schedule.build sets the place of DeepSpeed's WarmupDecayLR itself, and counts one update more."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = WarmupDecayLR(optimizer, 10, warmup_max_lr=1.0, warmup_num_steps=3, warmup_type="linear")
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0, 0, 1 / 3])


def test_deepspeeds_muon_is_clipped_by_the_norm_of_its_own_update():
    """Why Muon is ours: the recipe's limit is one of the gradient, as for every other optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    for parameter in model.parameters():
        parameter.use_muon = True
    x = torch.randn(2, 8)
    model(x).square().mean().backward()
    gradient = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]).item()
    model.zero_grad()
    engine = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 1, "reduce_scatter": False},
            "optimizer": {"type": "Muon", "params": {"lr": 0.02, "momentum": 0.95}},
        },
        dist_init_required=False,
    )[0]
    engine.backward(engine(x).square().mean())
    engine.step()
    norm = float(engine.get_global_grad_norm())
    deepspeed_patches.release(engine)
    assert norm > 2 * gradient


CLIPPED_BY_STAGE = """
import json, os, sys
from megagpt.cluster import from_environment
from megagpt.engine import init_deepspeed as start

start.start(from_environment(os.environ))
import deepspeed
import torch
from deepspeed.pipe import PipelineModule

torch.manual_seed(0)
pipe = PipelineModule(
    [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)], num_stages=2, partition_method="uniform",
    loss_fn=lambda out, labels: (out - labels).square().mean(),
)
before = [parameter.detach().clone() for parameter in pipe.parameters()]
engine = deepspeed.initialize(
    model=pipe, optimizer=torch.optim.SGD(pipe.parameters(), lr=1.0),
    config={"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.01, "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(sys.argv[1])}},
    dist_init_required=False,
)[0]
engine.train_batch(iter([(torch.ones(2, 4), torch.full((2, 4), 3.0))]))
moves = [(parameter - start).square().sum() for parameter, start in zip(pipe.parameters(), before)]
total = torch.stack(moves).sum()
torch.distributed.all_reduce(total)
print(json.dumps(float(total.sqrt())), file=sys.stderr)
start.stop()
"""


@pytest.mark.parametrize("stage", [0, 1])
def test_without_zero_a_pipeline_is_not_clipped_by_the_norm_of_the_whole_gradient(stage):
    """Why pipelines run on ZeRO-1: only there is the whole update as long as the limit."""
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CLIPPED_BY_STAGE, str(stage)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        answers = [process.communicate(timeout=200)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], answers
    length = float(answers[0].splitlines()[-1])
    if stage == 0:
        assert length > 1.2 * 0.01
    else:
        assert length == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_each_parameter_group_is_reduced_over_the_stages_by_itself(offload, monkeypatch):
    """Why the norm is taken by us: stages with different numbers of groups would wait for each other."""
    engine = zero(1, groups=2, offload=offload)
    reduced = []
    monkeypatch.setattr(
        engine.optimizer, "_model_parallel_all_reduce", lambda tensor, op: reduced.append(float(tensor))
    )
    engine.backward(engine(torch.ones(2, 4)).mean())
    theirs = float(engine.optimizer.scaled_global_norm())
    assert len(reduced) == 2
    reduced.clear()
    grad_norm.configure(engine.optimizer)
    assert float(engine.optimizer.scaled_global_norm()) == pytest.approx(theirs, rel=1e-6)
    assert len(reduced) == 1
    deepspeed_patches.release(engine)


def test_the_norm_of_no_gradients_fails():
    """Why the bf16 optimizer is given a norm in place of gradients: a tied head alone has none to count."""
    with pytest.raises(RuntimeError, match="non-empty TensorList"):
        get_global_norm_of_tensors([])


def test_with_bf16_and_offload_gradients_are_not_in_grad():
    """Why the gradient of a tied matrix is looked up in `grad_accum`, which a pipeline does not sum."""
    config = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine = zero(1, offload="cpu", gradient_accumulation_steps=2, **config)
    engine.backward(engine(torch.ones(2, 4).bfloat16()).float().mean())
    found = [(weight.grad, weight.grad_accum) for weight in engine.module.parameters()]
    deepspeed_patches.release(engine)
    assert all(gradient is None and accumulated.abs().max() > 0 for gradient, accumulated in found)
