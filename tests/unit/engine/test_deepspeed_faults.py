"""Faults of DeepSpeed that engine/ works around. If a test here fails, its workaround is not needed anymore."""

import importlib
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
from deepspeed.utils import groups, safe_get_full_optimizer_state

from megagpt.cluster import free_port
from megagpt.engine import deepspeed_patches

pytestmark = pytest.mark.usefixtures("collectives")


def test_in_bf16_a_parameter_used_in_loss_fn_is_not_trained():
    """Why PipelineStage computes the loss in its last layer: gradients are cleared when backward reaches its output."""
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
    assert moved["1.head.bias"] < 0.01  # although its gradient is far from 0


def zero(stage, groups=1, offload=None, **config):
    """Return an engine on two linear layers, each in its own parameter group if there are two groups."""
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
    """Why deepspeed_patches.ClipBeforeStep clips there."""
    engine = zero(0)
    engine.backward(engine(torch.ones(2, 4)).mean())
    engine.step()
    norm = engine.get_global_grad_norm()
    deepspeed_patches.release(engine)
    assert norm is None


def test_at_stage_0_a_gradient_is_divided_by_the_accumulation_despite_scale_wrt_gas():
    """Why ZeroEngine lets DeepSpeed scale the loss: its hook is on the tensor that the model returned."""

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
    """Why state/partitions.py reads moments itself: DeepSpeed links all groups after the first one's step."""
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
    """Why bf16 never runs at stage 0: an update with zero gradients is counted, and applies weight decay."""
    engine = zero(0, bf16={"enabled": True})
    steps = {int(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    deepspeed_patches.release(engine)
    assert steps == {1}


def test_in_bf16_with_offload_a_rejected_gradient_is_kept():
    """Why deepspeed_patches.undo_skipped_step discards it."""
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
    """Why deepspeed_patches.configure_loss_scale lets the scale grow after the step."""

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


def test_a_dtype_given_to_zero_init_is_taken_for_bf16_without_fp16(monkeypatch):
    """Why zero.Init reads the precision from the config: fp32 would otherwise train in bf16 on most CPUs."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with deepspeed.zero.Init(dtype=torch.float32):
        layer = torch.nn.Linear(4, 4)
    assert layer.weight.ds_tensor.dtype == torch.bfloat16


def test_the_first_two_updates_of_deepspeeds_warmup_have_the_rate_0():
    """Why lr_schedule.build sets the position of DeepSpeed's WarmupDecayLR itself, and adds one update."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = WarmupDecayLR(optimizer, 10, warmup_max_lr=1.0, warmup_num_steps=3, warmup_type="linear")
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0, 0, 1 / 3])


def test_deepspeeds_muon_is_clipped_by_the_norm_of_its_own_update():
    """Why Muon is our own: the recipe limits the norm of the gradient, as for every other optimizer."""
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
    """Why pipelines run on ZeRO-1: only there is the norm of the whole update the limit."""
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
    """Why deepspeed_patches.configure_grad_norm exists: stages with different numbers of groups would deadlock."""
    engine = zero(1, groups=2, offload=offload)
    reduced = []
    monkeypatch.setattr(
        engine.optimizer, "_model_parallel_all_reduce", lambda tensor, op: reduced.append(float(tensor))
    )
    engine.backward(engine(torch.ones(2, 4)).mean())
    theirs = float(engine.optimizer.scaled_global_norm())
    assert len(reduced) == 2
    reduced.clear()
    deepspeed_patches.configure_grad_norm(engine.optimizer)
    assert float(engine.optimizer.scaled_global_norm()) == pytest.approx(theirs, rel=1e-6)
    assert len(reduced) == 1
    deepspeed_patches.release(engine)


def test_the_norm_of_no_gradients_fails():
    """Why configure_grad_norm passes the bf16 optimizer a norm: a stage with only a tied head has no gradients."""
    with pytest.raises(RuntimeError, match="non-empty TensorList"):
        get_global_norm_of_tensors([])


def test_with_bf16_and_offload_gradients_are_not_in_grad():
    """Why deepspeed_patches.with_accumulated_gradients exists: a pipeline does not sum `grad_accum`."""
    config = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine = zero(1, offload="cpu", gradient_accumulation_steps=2, **config)
    engine.backward(engine(torch.ones(2, 4).bfloat16()).float().mean())
    found = [(weight.grad, weight.grad_accum) for weight in engine.module.parameters()]
    deepspeed_patches.release(engine)
    assert all(gradient is None and accumulated.abs().max() > 0 for gradient, accumulated in found)


def test_a_destroyed_engine_leaves_its_process_groups_to_the_next_one(monkeypatch):
    """Why deepspeed_patches.release resets the globals of DeepSpeed's process groups."""
    first = zero(0)
    second = zero(0)
    monkeypatch.setattr(groups, "mpu", "grid")
    monkeypatch.setattr(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", "group")
    first.destroy()
    assert (groups.mpu, groups._ZERO_PARAM_INTRA_PARALLEL_GROUP) == ("grid", "group")
    deepspeed_patches.release(second)
    assert (groups.mpu, groups._ZERO_PARAM_INTRA_PARALLEL_GROUP) == (None, None)


def test_the_shared_memory_operator_is_built_if_it_is_listed_as_compatible(monkeypatch):
    """Why deepspeed_patches.skip_shared_memory_operator removes it from the list."""
    built = []

    class Builder:
        NAME = "deepspeed_shm_comm"

        def load(self):
            built.append(self.NAME)

        def absolute_name(self):
            return self.NAME

    # the package has the name `torch` from elsewhere, too
    deepspeed_comm = importlib.import_module("deepspeed.comm.torch")
    monkeypatch.setattr(type(get_accelerator()), "create_op_builder", lambda *_: Builder())
    monkeypatch.setitem(vars(deepspeed.ops), "__compatible_ops__", {"deepspeed_shm_comm": True})
    deepspeed_comm.build_shm_op()
    assert built == ["deepspeed_shm_comm"]
    deepspeed_patches.skip_shared_memory_operator()
    deepspeed_comm.build_shm_op()
    assert built == ["deepspeed_shm_comm"]
