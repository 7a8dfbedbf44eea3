"""Faults of DeepSpeed that engine/ goes round. A test that fails here says that the way round can go."""

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule

from megagpt.distributed import Rank
from megagpt.engine import native, start


@pytest.fixture(scope="module")
def group():
    start.start(Rank())
    yield
    start.stop()


def test_in_bf16_a_parameter_used_in_loss_fn_is_not_trained(group):
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
    native.release(engine)
    assert moved["0.weight"] > 0.05
    assert moved["1.head.bias"] < 0.01  # its gradient is far from 0
