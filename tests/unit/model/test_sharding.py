"""Cutting a parameter over tensor-parallel ranks: every value on exactly one rank, whole heads, and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config.recipe import ModelSection
from megagpt.model.gpt import GPT
from megagpt.model.layers import MLP, Attention
from megagpt.model.sharding import Cut, cut_of

SECTION = ModelSection(
    n_layer=1, n_head=8, n_kv_head=4, d_model=32, d_ff=48, vocab_size=40, seq_len=8, activation="swiglu"
)  # fmt: skip


@given(
    shares=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    degree=st.integers(1, 4),
    dim=st.integers(0, 1),
    other=st.integers(1, 3),
)
def test_parts_joined_are_the_whole_and_no_value_is_on_two_ranks(shares, degree, dim, other):
    cut = Cut(dim, tuple(share * degree for share in shares))
    shape = [other, other]
    shape[dim] = sum(cut.blocks)
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    parts = [cut.part(whole, index, degree) for index in range(degree)]
    assert torch.equal(cut.join(parts), whole)
    assert sorted(torch.cat([part.flatten() for part in parts]).tolist()) == list(range(whole.numel()))
    assert {part.shape for part in parts} == {parts[0].shape}


def test_which_parameters_are_cut():
    names = [name for name, _ in GPT(SECTION).named_parameters() if cut_of(name, SECTION, 2) is not None]
    block = [f"attention.{name}" for name in ("qkv.weight", "qkv.bias", "output.weight")]
    block += [f"mlp.{name}" for name in ("gate.weight", "gate.bias", "up.weight", "up.bias", "down.weight")]
    assert names == ["layers.0.weight", *(f"layers.2.{name}" for name in block)]
    assert cut_of("layers.0.weight", SECTION, 3) is None  # 40 rows
    untied = SECTION.model_copy(update={"tie_embeddings": False, "position": "rope"})
    assert [name for name, _ in GPT(untied).named_parameters()][-1] == "layers.3.weight"
    assert cut_of("layers.3.weight", untied, 2) == Cut(0, (40,))
    assert cut_of("layers.2.weight", untied, 2) is None  # the last norm


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("kind", [Attention, MLP])
def test_the_parts_of_a_layer_add_up_to_it(kind, degree):
    torch.manual_seed(0)
    model = GPT(SECTION)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    ((prefix, layer),) = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    hidden = torch.randn(2, 8, 32)
    whole = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    expected = layer(hidden)
    total = torch.zeros_like(expected)
    for index in range(degree):
        for name, module in layer.named_modules():
            for kept in ("weight", "bias"):
                full = f"{name}.{kept}"
                if full not in whole:
                    continue
                cut = cut_of(f"{prefix}.{full}", SECTION, degree)
                part = whole[full] if cut is None else cut.part(whole[full], index, degree)
                if cut is None:  # the last bias is whole on every rank, and added once after the sum
                    part = part if index == 0 else torch.zeros_like(part)
                setattr(module, kept, torch.nn.Parameter(part))
        total = total + layer(hidden)
    torch.testing.assert_close(total, expected)
