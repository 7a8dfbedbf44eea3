"""Planned traffic, disk and training state compared with hand-computed figures and DeepSpeed's own estimates."""

import json

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagpt.config import deepspeed as ds_config
from megagpt.config import recipe as recipes
from megagpt.config.deepspeed.known_keys import recorded_keys
from megagpt.model import flops
from megagpt.plan import cost_estimate
from megagpt.plan.memory import memory
from megagpt.plan.rank_state import ZeroSettings, local_parameters
from megagpt.plan.states import state_bytes

RECIPE = """
run_dir: unused
precision: bf16
model: {n_layer: 8, n_head: 8, d_model: 512, vocab_size: 4096, seq_len: 256, position: rope, tie_embeddings: false}
data: {train: unused}
batch: {global_size: 64}
optimizer: {type: adamw, lr: 1.0e-3}
schedule: {type: warmup_decay, warmup_updates: 1}
length: {updates: 10}
"""
BUCKET = {"reduce_bucket_size": 1_000_000}  # DeepSpeed's default of a gigabyte would outweigh this model
HIDDEN = 2 * 256 * 512  # bytes per sample


@pytest.fixture(scope="module")
def resolve(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums")
    (folder / "recipe.yaml").write_text(RECIPE)

    def resolved(ranks, stage=1, micro=2, overrides=(), **more):
        config = {"train_micro_batch_size_per_gpu": micro, "zero_optimization": {"stage": stage, **BUCKET}, **more}
        (folder / "config.json").write_text(json.dumps(config))
        recipe = recipes.load(folder / "recipe.yaml", overrides)
        return ds_config.load(folder / "config.json", recipe, ranks, recorded_keys())

    return resolved


def test_one_rank_sends_nothing(resolve):
    assert cost_estimate.traffic(resolve(1)) == cost_estimate.Traffic(0, 0, 0, 0)


def test_data_parallel_traffic_is_that_of_ring_collectives(resolve):
    weights = 2 * flops.parameters(resolve(1).recipe.model)
    # 64 samples over 4 ranks by 2: 8 micro-batches
    expected = {1: 3 / 4 * 3 * weights, 2: 3 / 4 * (8 + 1) * weights, 3: 3 / 4 * 8 * 3 * weights}
    for stage, sent in expected.items():
        assert cost_estimate.traffic(resolve(4, stage)).data_parallel == int(sent)


def test_model_parallel_ranks_send_hidden_states(resolve):
    micro_batches = 32
    parts = cost_estimate.traffic(resolve(2, tensor_parallel={"autotp_size": 2}))
    assert (
        parts.tensor_parallel == micro_batches * 8 * 4 * 2 * HIDDEN
    )  # four all-reduces per block, each of which sends its input
    stages = cost_estimate.traffic(resolve(4, pipeline={"stages": 4}))
    assert stages.pipeline == micro_batches * 2 * 2 * HIDDEN  # a middle stage: activations forward, gradients backward
    sequence = cost_estimate.traffic(resolve(2, sequence_parallel_size=2))
    # q, k, v and the output of attention: half a sequence each, half of it to the other rank; forward and backward
    assert sequence.sequence_parallel == micro_batches * 8 * 2 * 4 * (2 * HIDDEN // 2) // 2


def test_a_checkpoint_has_12_bytes_per_parameter(resolve):
    resolved = resolve(1, overrides=("checkpoint.keep_last=2",))
    found, one = cost_estimate.disk(resolved, 1000), 12 * flops.parameters(resolved.recipe.model)
    assert (found.checkpoint, found.checkpoints, found.corpus) == (one, 3 * one, 2000)
    assert cost_estimate.disk(resolve(1, overrides=("checkpoint.keep_last=null",)), 1000).checkpoints is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stage=st.sampled_from([1, 2, 3]), ranks=st.sampled_from([1, 2, 4, 8]), micro=st.sampled_from([1, 2, 4]),
    recompute=st.booleans(), cpu=st.booleans(),
)  # fmt: skip
def test_settings_that_save_memory_never_increase_it(resolve, stage, ranks, micro, recompute, cpu):
    def peak(stage=stage, ranks=ranks, micro=micro, recompute=recompute):
        more = {"activation_checkpointing": {"number_checkpoints": "auto"}} if recompute else {}
        return memory(resolve(ranks, stage, micro, **more), cpu).device

    here = peak()
    assert here <= peak(micro=2 * micro)
    assert peak(recompute=True) <= peak(recompute=False)
    if ranks < 8:
        assert peak(ranks=2 * ranks) <= here
    assert peak(stage=2) <= peak(stage=1)  # not so at stage 3, which gathers what stage 2 keeps


@pytest.mark.parametrize("ranks", [1, 4, 64])
def test_training_state_is_near_deepspeeds_own_estimates(resolve, capsys, ranks):
    """Our estimates are never larger, and at stage 2 more than half: DeepSpeed's include a copy for the step."""
    for stage, estimate in ((2, estimate_zero2_model_states_mem_needs), (3, estimate_zero3_model_states_mem_needs)):
        resolved = resolve(min(ranks, 32), stage, 1)
        local = local_parameters(resolved.recipe.model, resolved.layout)
        ours = state_bytes(ZeroSettings(resolved), local)
        total = ours.weights + ours.optimizer + ours.gradients
        largest = (max(local.layers),) if stage == 3 else ()
        theirs = estimate(local.total, *largest, resolved.layout.world_size, 1, cpu_offload=False)[1]
        assert total <= 1.01 * theirs
        assert total > 0.5 * theirs or stage == 3  # theirs add the largest layer, which ours count as a buffer
