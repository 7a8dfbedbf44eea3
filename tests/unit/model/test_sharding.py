"""Sharding of parameters over tensor-parallel ranks: every value on exactly one rank, whole heads, and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config.recipe import ModelSection
from megagpt.model.attention import Attention
from megagpt.model.gpt import GPT
from megagpt.model.layers import MLP
from megagpt.model.sharding import ShardSpec, shard_spec

SECTION = ModelSection(
    n_layer=1, n_head=8, n_kv_head=4, d_model=32, d_ff=48, vocab_size=40, seq_len=8, activation="swiglu"
)  # fmt: skip


@given(
    shares=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    degree=st.integers(1, 4),
    dim=st.integers(0, 1),
    other=st.integers(1, 3),
)
def test_joined_shards_are_the_whole_and_no_value_is_on_two_ranks(shares, degree, dim, other):
    spec = ShardSpec(dim, tuple(share * degree for share in shares))
    shape = [other, other]
    shape[dim] = sum(spec.sections)
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    parts = [spec.shard(whole, index, degree) for index in range(degree)]
    assert torch.equal(spec.join(parts), whole)
    assert sorted(torch.cat([part.flatten() for part in parts]).tolist()) == list(range(whole.numel()))
    assert {part.shape for part in parts} == {parts[0].shape}


def test_which_parameters_are_sharded():
    names = [name for name, _ in GPT(SECTION).named_parameters() if shard_spec(name, SECTION, 2) is not None]
    block = [f"attention.{name}" for name in ("qkv.weight", "qkv.bias", "output.weight")]
    block += [f"mlp.{name}" for name in ("gate.weight", "gate.bias", "up.weight", "up.bias", "down.weight")]
    assert names == ["layers.0.weight", *(f"layers.2.{name}" for name in block)]
    assert shard_spec("layers.0.weight", SECTION, 3) is None  # 40 rows
    untied = SECTION.model_copy(update={"tie_embeddings": False, "position": "rope"})
    assert [name for name, _ in GPT(untied).named_parameters()][-1] == "layers.3.weight"
    assert shard_spec("layers.3.weight", untied, 2) == ShardSpec(0, (40,))
    assert shard_spec("layers.2.weight", untied, 2) is None  # the last norm


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("kind", [Attention, MLP])
def test_the_outputs_of_a_layers_shards_add_up_to_its_output(kind, degree):
    torch.manual_seed(0)
    model = GPT(SECTION)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    ((prefix, layer),) = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    hidden = torch.randn(2, 8, 32)
    whole = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    arguments = (hidden, model.contexts.for_batch(torch.zeros(2, 8))) if kind is Attention else (hidden,)
    expected = layer(*arguments)
    total = torch.zeros_like(expected)
    for index in range(degree):
        for name, module in layer.named_modules():
            for kept in ("weight", "bias"):
                full = f"{name}.{kept}"
                if full not in whole:
                    continue
                spec = shard_spec(f"{prefix}.{full}", SECTION, degree)
                part = whole[full] if spec is None else spec.shard(whole[full], index, degree)
                if spec is None:  # the last bias is whole on every rank, and added once after the sum
                    part = part if index == 0 else torch.zeros_like(part)
                setattr(module, kept, torch.nn.Parameter(part))
        total = total + layer(*arguments)
    torch.testing.assert_close(total, expected)
