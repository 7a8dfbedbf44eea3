"""The chunked cross-entropy compared with torch's: values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from megagpt.model import flops, loss
from megagpt.model.loss import cross_entropy_sum


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Run a test with all tokens in one chunk, and with uneven chunks of 8 or 9 tokens."""
    if request.param == "many chunks":
        monkeypatch.setattr(flops, "chunk_tokens", lambda rows, on_cpu: 9)


@pytest.fixture
def inputs():
    """hidden [3, 17, 24], weight [37, 24], labels [3, 17] of which some are ignored."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, 17, 24, generator=generator).requires_grad_()
    weight = torch.randn(37, 24, generator=generator).requires_grad_()
    labels = torch.randint(37, (3, 17), generator=generator)
    labels[0, 3:] = labels[2, ::2] = -100
    return hidden, weight, labels


def expected_loss(hidden, weight, labels, softcap=None):
    logits = hidden.double() @ weight.double().t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def gradients(loss, hidden, weight):
    return torch.autograd.grad(loss, (hidden, weight), retain_graph=True)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("scale", [1.0, 0.25, -3.0])
def test_value_and_gradients_equal_torchs_when_scaled(inputs, softcap, scale):
    hidden, weight, labels = inputs
    expected = expected_loss(hidden, weight, labels, softcap)
    actual = cross_entropy_sum(hidden, weight, labels, softcap)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(
        gradients(actual * scale, hidden, weight), gradients(expected * scale, hidden, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("chunks")
def test_a_loss_used_twice_has_the_sum_of_both_gradients(inputs):
    hidden, weight, labels = inputs
    once = gradients(cross_entropy_sum(hidden, weight, labels), hidden, weight)
    twice = cross_entropy_sum(hidden, weight, labels)
    for one, both in zip(once, gradients(twice * 2 + twice, hidden, weight), strict=True):
        torch.testing.assert_close(both, one * 3)
    for one, again in zip(once, gradients(twice, hidden, weight), strict=True):  # a second backward pass
        torch.testing.assert_close(again, one)


@pytest.mark.usefixtures("chunks")
def test_gradients_flow_to_earlier_operations_and_accumulate(inputs):
    hidden, weight, labels = inputs
    for _ in range(2):
        cross_entropy_sum(hidden * 2, weight, labels).backward()
    expected = gradients(expected_loss(hidden * 2, weight, labels), hidden, weight)
    torch.testing.assert_close(hidden.grad, 2 * expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad, 2 * expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("chunks")
def test_ignored_tokens_have_no_gradient_and_only_ignored_tokens_give_zero(inputs):
    hidden, weight, labels = inputs
    d_hidden = gradients(cross_entropy_sum(hidden, weight, labels), hidden, weight)[0]
    assert (d_hidden[labels == -100] == 0).all()
    assert (d_hidden[labels != -100] != 0).any(-1).all()
    nothing = cross_entropy_sum(hidden, weight, torch.full_like(labels, -100))
    assert nothing.item() == 0
    assert all((g == 0).all() for g in gradients(nothing, hidden, weight))


@pytest.mark.usefixtures("chunks")
def test_the_gradient_of_one_input_is_the_same_if_the_other_is_frozen(inputs):
    hidden, weight, labels = inputs
    d_hidden, d_weight = gradients(cross_entropy_sum(hidden, weight, labels), hidden, weight)
    (alone,) = torch.autograd.grad(cross_entropy_sum(hidden, weight.detach(), labels), hidden)
    torch.testing.assert_close(alone, d_hidden, rtol=0, atol=0)
    (alone,) = torch.autograd.grad(cross_entropy_sum(hidden.detach(), weight, labels), weight)
    torch.testing.assert_close(alone, d_weight, rtol=0, atol=0)


@pytest.mark.usefixtures("chunks")
def test_evaluation_gives_the_same_value_and_computes_no_gradients(inputs, monkeypatch):
    expected = cross_entropy_sum(*inputs)
    monkeypatch.setattr(loss, "_logit_gradient", None)  # calling it would fail
    with torch.no_grad():
        actual = cross_entropy_sum(*inputs)
    assert not actual.requires_grad
    assert torch.equal(actual, expected)


@pytest.mark.usefixtures("chunks")
def test_bf16_is_as_accurate_as_torchs_bf16(inputs):
    hidden, weight, labels = inputs
    exact = gradients(expected_loss(hidden, weight, labels), hidden, weight)
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    ours = gradients(cross_entropy_sum(*low, labels), *low)
    logits = F.linear(*low).float()
    theirs = gradients(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), *low)
    for our, their, right in zip(ours, theirs, exact, strict=True):
        assert our.dtype == torch.bfloat16
        assert (our - right).norm() <= 1.1 * (their - right).norm()


def test_chunks_cover_every_token_once_and_limit_the_logits():
    for tokens, vocabulary in [(1, 50), (1024, 2048), (5000, 50304), (16384, 8192), (0, 9)]:
        rows, weight = torch.empty(tokens, 1), torch.empty(vocabulary, 1)
        parts = list(loss._chunks(rows, weight))
        assert torch.cat([torch.arange(tokens)[part] for part in parts]).equal(torch.arange(tokens))
        assert all((part.stop - part.start) * vocabulary <= max(2**21, 512 * vocabulary) for part in parts)
    assert len(list(loss._chunks(torch.empty(1024, 1), torch.empty(2048, 1)))) == 1


def test_no_tensor_of_all_logits_is_ever_allocated():
    """4096 tokens × a vocabulary of 4096: 64 MiB of fp32 logits, of which an eighth is held at a time."""
    hidden, weight = torch.randn(4096, 8).requires_grad_(), torch.randn(4096, 8).requires_grad_()
    labels = torch.randint(4096, (4096,))
    with torch.profiler.profile(profile_memory=True) as profile:
        cross_entropy_sum(hidden, weight, labels).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 2 * 2**20 * 4 * 2
