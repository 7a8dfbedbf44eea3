"""Dropout sits where GPT-2 has it: after the embeddings, on the attention weights, on both residual branches."""

import pytest
import torch

SHARE = 0.25


def share_of_zeros(x):
    return (x == 0).float().mean().item()


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_embeddings_and_branches_lose_their_share_while_training(tiny, random_gpt, position):
    model = random_gpt(tiny(position=position, dropout=SHARE))
    ids = torch.randint(61, (64, 16), generator=torch.Generator().manual_seed(1))
    first = 1 if position == "learned" else 0
    seen = {}
    for name in (f"layers.{first}", f"layers.{first + 1}.attention", f"layers.{first + 1}.mlp"):
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
    torch.manual_seed(0)
    model(ids)
    assert len(seen) == 3
    for name, output in seen.items():
        assert share_of_zeros(output) == pytest.approx(SHARE, abs=0.02), name
    model.eval()(ids)
    assert all(share_of_zeros(output) < 0.01 for output in seen.values())


def test_attention_weights_are_dropped_and_scaled_up(tiny, random_gpt):
    attention = random_gpt(tiny(dropout=SHARE)).layers[1].attention
    q, k = torch.randn(2, 64, 16, 4, 8, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(64, 16, 4, 8)
    torch.manual_seed(0)
    kept = attention.attend(q, k, ones)[:, 0, :, 0]  # the first token sees itself alone: its weight is 1
    assert share_of_zeros(kept) == pytest.approx(SHARE, abs=0.08)
    assert kept.max().item() == pytest.approx(1 / (1 - SHARE))
    torch.testing.assert_close(attention.eval().attend(q, k, ones), ones)
