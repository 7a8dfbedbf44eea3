"""Recomputation of activations saves memory and changes no gradient."""

import pytest
import torch

from megagpt.config.recipe import ModelSection
from megagpt.engine.init_model import recompute
from megagpt.model.gpt import GPT, initialize
from megagpt.model.layers import Block

SECTION = ModelSection(n_layer=5, n_head=4, d_model=32, vocab_size=64, seq_len=16)


def gradients(number, on_host=False):
    """Return gradients, bytes saved for the backward pass, and how often each block ran."""
    model, kept, runs = GPT(SECTION), {}, []
    initialize(model, 1)
    recompute(model.layers, number, on_host)
    blocks = [layer for layer in model.layers if isinstance(layer, Block)]
    for index, block in enumerate(blocks):
        block.attention.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [p.grad for p in model.parameters()], sum(kept.values()), [runs.count(index) for index in range(5)]


@pytest.mark.parametrize(("number", "runs"), [(0, [1, 1, 1, 1, 1]), (2, [1, 1, 2, 1, 2]), (5, [2, 2, 2, 2, 2])])
@pytest.mark.parametrize("on_host", [False, True])
def test_gradients_are_equal_and_the_chosen_blocks_run_twice(number, runs, on_host):
    expected, _, _ = gradients(0)
    got, _, counted = gradients(number, on_host)
    assert counted == runs
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_the_more_is_recomputed_the_less_is_saved():
    kept = [gradients(number)[1] for number in (0, 2, 5)]
    assert kept[0] > kept[1] > kept[2]
    assert kept[2] < kept[0] / 3


def test_nothing_is_recomputed_without_gradients():
    model = GPT(SECTION)
    initialize(model, 1)
    recompute(model.layers, 5, False)
    with torch.no_grad():
        assert model(torch.zeros(1, 4, dtype=torch.int64)).logits.shape == (1, 4, 64)
