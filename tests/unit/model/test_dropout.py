"""Dropout is applied where GPT-2 applies it: to the embeddings, the attention weights and both residual branches."""

import pytest
import torch

PROBABILITY = 0.25


def fraction_of_zeros(x):
    return (x == 0).float().mean().item()


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_embeddings_and_branches_are_dropped_in_training_only(tiny, random_gpt, position):
    model = random_gpt(tiny(position=position, dropout=PROBABILITY))
    ids = torch.randint(61, (64, 16), generator=torch.Generator().manual_seed(1))
    first = 1 if position == "learned" else 0
    outputs = {}
    for name in (f"layers.{first}", f"layers.{first + 1}.attention", f"layers.{first + 1}.mlp"):
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: outputs.__setitem__(name, o))
    torch.manual_seed(0)
    model(ids)
    assert len(outputs) == 3
    for name, output in outputs.items():
        assert fraction_of_zeros(output) == pytest.approx(PROBABILITY, abs=0.02), name
    model.eval()(ids)
    assert all(fraction_of_zeros(output) < 0.01 for output in outputs.values())


def test_attention_weights_are_dropped_and_scaled_up(tiny, random_gpt):
    attention = random_gpt(tiny(dropout=PROBABILITY)).layers[1].attention
    q, k = torch.randn(2, 64, 16, 4, 8, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(64, 16, 4, 8)
    torch.manual_seed(0)
    kept = attention.attend(q, k, ones)[:, 0, :, 0]  # the first token attends only to itself, with weight 1
    assert fraction_of_zeros(kept) == pytest.approx(PROBABILITY, abs=0.08)
    assert kept.max().item() == pytest.approx(1 / (1 - PROBABILITY))
    torch.testing.assert_close(attention.eval().attend(q, k, ones), ones)
