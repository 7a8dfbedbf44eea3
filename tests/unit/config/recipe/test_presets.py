"""Presets against published parameter counts, with the arithmetic of the papers repeated independently."""

from __future__ import annotations

import pytest

from megagpt.config.recipe import PRESETS, ModelSection
from megagpt.model import flops

# Parameters of the published checkpoints: the sums of their tensors' sizes on the Hugging Face hub,
# a tied head counted once.
GPT2 = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
}
LLAMA = {
    "llama-1b": 1_100_048_384,  # TinyLlama/TinyLlama_v1.1
    "llama-7b": 6_738_415_616,  # meta-llama/Llama-2-7b-hf
    "llama-70b": 68_976_648_192,  # meta-llama/Llama-2-70b-hf
}
# Brown et al. 2020, table 2.1: parameters as printed, to which the count must round.
GPT3 = {"gpt3-2.7b": (2.7e9, 0.1e9), "gpt3-6.7b": (6.7e9, 0.1e9), "gpt3-13b": (13e9, 1e9), "gpt3-175b": (175e9, 1e9)}


def gpt_parameters(m: ModelSection) -> int:
    """Embeddings, then per block attention 4·d² + 4·d, feed-forward 8·d² + 5·d, two layer norms; a last norm."""
    block = (4 * m.d_model**2 + 4 * m.d_model) + (8 * m.d_model**2 + 5 * m.d_model) + 4 * m.d_model
    return (m.vocab_size + m.seq_len) * m.d_model + m.n_layer * block + 2 * m.d_model


def llama_parameters(m: ModelSection) -> int:
    """Two vocabulary matrices, then per block q, o, narrow k and v, three feed-forward matrices, two norms."""
    head = m.d_model // m.n_head
    attention = 2 * m.d_model**2 + 2 * m.d_model * m.n_kv_head * head
    block = attention + 3 * m.d_model * m.d_ff + 2 * m.d_model
    return 2 * m.vocab_size * m.d_model + m.n_layer * block + m.d_model


@pytest.mark.parametrize(("name", "count"), GPT2.items())
def test_gpt2_has_the_published_number_of_parameters(name, count):
    model = ModelSection(preset=name)
    assert gpt_parameters(model) == count
    assert (model.position, model.norm, model.activation, model.tie_embeddings) == (
        "learned", "layernorm", "gelu", True,
    )  # fmt: skip
    assert (model.d_ff, model.n_kv_head) == (4 * model.d_model, model.n_head)


@pytest.mark.parametrize(("name", "printed"), GPT3.items())
def test_gpt3_has_about_the_published_number_of_parameters(name, printed):
    count, unit = printed
    assert abs(gpt_parameters(ModelSection(preset=name)) - count) < unit
    assert ModelSection(preset=name).d_model % ModelSection(preset=name).n_head == 0


@pytest.mark.parametrize(("name", "count"), LLAMA.items())
def test_llama_has_the_published_number_of_parameters(name, count):
    model = ModelSection(preset=name)
    assert llama_parameters(model) == count
    assert (model.position, model.norm, model.activation, model.tie_embeddings) == (
        "rope", "rmsnorm", "swiglu", False,
    )  # fmt: skip


def test_every_preset_is_covered():
    assert set(PRESETS) == {"quickstart", *GPT2, *GPT3, *LLAMA}
    assert all(ModelSection(preset=name).dropout == 0 for name in PRESETS)


def test_parameter_count_agrees_with_published_models():
    for name, count in {**GPT2, **LLAMA}.items():
        assert flops.parameters(ModelSection(preset=name)) == count


def test_given_keys_override_the_preset():
    model = ModelSection(preset="gpt2-124m", n_layer=2, vocab_size=50304)
    assert (model.n_layer, model.vocab_size, model.d_model) == (2, 50304, 768)
