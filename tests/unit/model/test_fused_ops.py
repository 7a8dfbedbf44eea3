"""Hand-written backward passes compared with autograd through the plain formulas: fp32, bf16, unusual strides."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.model.fused_ops import relu_squared, rms_norm, split_heads


def seeded(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(tokens, half):
    angles = seeded(tokens, 1, half, seed=9)
    return angles.cos(), angles.sin()


def plain_split(qkv, kv_heads, tables, epsilon):
    q, k, v = qkv.float().split([qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)

    def change(x):
        if epsilon is not None:
            x = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
        if tables is None:
            return x
        first, second = x.chunk(2, -1)
        cosine, sine = tables
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)

    return tuple(x.to(qkv.dtype) for x in (change(q), change(k), v))


def assert_same(ours, plain, inputs, tolerance):
    """Assert that outputs are equal, and gradients are equal for random incoming gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    actual, expected = ours(*inputs), plain(*inputs)
    incoming = [seeded(*y.shape, dtype=y.dtype, seed=i) for i, y in enumerate(expected)]
    pairs = list(zip(actual, expected, strict=True))
    gradients = [torch.autograd.grad(y, inputs, incoming) for y in (actual, expected)]
    for a, e in [*pairs, *zip(*gradients, strict=True)]:
        assert a.dtype == e.dtype
        assert e.abs().max() > 0
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * e.abs().max().item())


DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)]  # two units in the last place of 8 bits


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("epsilon", [None, 1e-5, 0.5])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_split_heads(dtype, tolerance, epsilon, rotate, kv_heads):
    turn = tables(5, 4) if rotate else None
    assert_same(
        lambda x: split_heads(x, kv_heads, turn, epsilon),
        lambda x: plain_split(x, kv_heads, turn, epsilon),
        [seeded(2, 5, 2 + 2 * kv_heads, 8, dtype=dtype)],
        tolerance,
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_split_heads_of_any_shape_and_stride(batch, tokens, kv_heads, group, half, transposed):
    shape = (batch, tokens, (group + 2) * kv_heads, 2 * half)
    x = seeded(*shape)
    if transposed:
        x = seeded(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    turn = tables(tokens, half)
    assert_same(
        lambda x: split_heads(x, kv_heads, turn, 1e-5), lambda x: plain_split(x, kv_heads, turn, 1e-5), [x], 1e-4
    )


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
@pytest.mark.parametrize("shape", [(2, 5, 12), (3, 12), (1, 1, 12)])
def test_rms_norm(dtype, tolerance, epsilon, shape):
    def plain(x, weight):
        x = x.float()
        return ((x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.float()).to(dtype),)

    inputs = [seeded(*shape, dtype=dtype), seeded(12, dtype=dtype, seed=1)]
    assert_same(lambda x, w: (rms_norm(x, w, epsilon),), plain, inputs, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_relu_squared(dtype, tolerance):
    x = torch.cat((seeded(40), torch.zeros(3))).to(dtype)
    assert_same(lambda x: (relu_squared(x),), lambda x: (F.relu(x).square(),), [x], tolerance)


@pytest.mark.parametrize("function", ["rms_norm", "relu_squared", "split_heads"])
def test_backward_modifies_neither_inputs_nor_incoming_gradients(function):
    call = {
        "rms_norm": lambda x: rms_norm(x, torch.ones(8), 1e-5),
        "relu_squared": relu_squared,
        "split_heads": lambda x: torch.cat(split_heads(x, 1, tables(5, 4), 1e-5), dim=2),
    }[function]
    x = seeded(2, 5, 4, 8).requires_grad_()
    before, output = x.detach().clone(), call(x)
    incoming = torch.ones_like(output)
    first = torch.autograd.grad(output, x, incoming, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(output, x, incoming)[0], first)
    assert torch.equal(x, before)
    assert torch.equal(incoming, torch.ones_like(output))
