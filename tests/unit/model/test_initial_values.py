"""Initial weights depend only on seed, name, shape and model section, and have the right distribution."""

import math

import pytest
import torch

from megagpt.model.gpt import GPT, initial_value, initialize

WIDE = {"d_model": 128, "d_ff": 256, "vocab_size": 512, "n_layer": 3}


def initialized(section, seed=1, device="cpu", dtype=torch.float32):
    model = GPT(section).to(dtype) if device == "cpu" else GPT(section)
    initialize(model, seed)
    return dict(model.named_parameters())


def test_values_do_not_depend_on_order_or_on_other_parameters(tiny):
    section = tiny(tie_embeddings=True, norm="layernorm", position="learned")
    whole = initialized(section)
    for name in reversed(list(whole)):
        torch.randn(3)  # the global generator is not used
        assert torch.equal(initial_value(name, whole[name].shape, section, 1), whole[name]), name


def test_parameters_of_equal_names_have_equal_values_in_deeper_and_tied_models(tiny):
    shallow, deep = (initialized(tiny(n_layer=n, init="zero_projections")) for n in (2, 3))
    same = [name for name in shallow if name.startswith(("layers.0", "layers.1", "layers.2"))]
    assert len(same) == 13
    assert all(torch.equal(shallow[name], deep[name]) for name in same)
    tied, untied = (initialized(tiny(tie_embeddings=t)) for t in (True, False))
    assert len(untied) == len(tied) + 1
    assert all(torch.equal(tied[name], untied[name]) for name in tied)


def test_a_different_seed_or_name_gives_different_values(tiny):
    section = tiny()
    a, b = initialized(section, 1), initialized(section, 2)
    qkv = [f"layers.{i}.attention.qkv.weight" for i in (1, 2)]
    assert not torch.equal(a[qkv[0]], b[qkv[0]])
    assert not torch.equal(a[qkv[0]], a[qkv[1]])


def test_a_model_built_on_the_meta_device_gets_the_same_bits(tiny):
    section = tiny(tie_embeddings=True)
    with torch.device("meta"):
        model = GPT(section)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    initialize(model, 1)
    expected = initialized(section)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    ids = torch.arange(16).unsqueeze(0)
    assert model(ids).logits.isfinite().all()


def test_values_are_real_tensors_under_a_meta_default_device(tiny):
    with torch.device("meta"):
        value = initial_value("layers.0.weight", (61, 32), tiny(), 1)
    assert torch.equal(value, initialized(tiny())["layers.0.weight"])


def test_low_precision_values_are_rounded_fp32_values(tiny):
    exact, rounded = initialized(tiny()), initialized(tiny(), dtype=torch.bfloat16)
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_means_and_deviations_are_those_of_gpt2(tiny, norm):
    values = initialized(tiny(**WIDE, norm=norm, position="learned"))
    for name, value in values.items():
        if value.ndim == 1:
            assert (value == (0 if name.endswith("bias") else 1)).all(), name
            continue
        residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
        std = 0.02 / math.sqrt(2 * 3) if residual else 0.02
        n = value.numel()
        assert value.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name  # five sigma
        assert value.mean().item() == pytest.approx(0, abs=5 * std / math.sqrt(n)), name
        assert value.abs().max() < 7 * std


def test_with_zero_projections_each_block_starts_as_the_identity(tiny):
    section = tiny(init="zero_projections")
    model = GPT(section)
    initialize(model, 1)
    zero = [name for name, p in model.named_parameters() if (p == 0).all()]
    assert sorted(zero) == sorted(
        f"layers.{i}.{part}.weight" for i in (1, 2) for part in ("attention.output", "mlp.down")
    )
    x = torch.randn(1, 16, 32)
    assert torch.equal(model.layers[1](x, model.contexts.for_batch(torch.zeros(1, 16))), x)


def test_the_first_loss_is_that_of_a_uniform_guess(tiny, batch):
    model = GPT(tiny())
    initialize(model, 3)
    ids, labels = batch
    assert model(ids, labels=labels).loss.item() == pytest.approx(math.log(61), rel=0.02)
