"""Logits and all gradients compared with Hugging Face's GPT-2, Llama and Qwen3 (for qk_norm), in fp32."""

import pytest
import torch
import torch.nn.functional as F
import transformers

GPT2_BLOCK = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
LLAMA_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def their_gpt2(section):
    config = transformers.GPT2Config(
        vocab_size=section.vocab_size,
        n_positions=section.seq_len,
        n_embd=section.d_model,
        n_layer=section.n_layer,
        n_head=section.n_head,
        n_inner=section.d_ff,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=section.tie_embeddings,
    )
    return transformers.GPT2LMHeadModel(config)


def gpt2_names(section):
    """Our name → (their names, whether theirs is transposed)."""
    last = section.n_layer + 2
    names = {
        "layers.0.weight": (["transformer.wte.weight"], False),
        "layers.1.weight": (["transformer.wpe.weight"], False),
        f"layers.{last}.weight": (["transformer.ln_f.weight"], False),
        f"layers.{last}.bias": (["transformer.ln_f.bias"], False),
    }
    if not section.tie_embeddings:
        names[f"layers.{last + 1}.weight"] = (["lm_head.weight"], False)
    for i in range(section.n_layer):
        for ours, theirs in GPT2_BLOCK.items():
            for kind in ("weight", "bias"):
                transposed = kind == "weight" and "norm" not in ours
                names[f"layers.{i + 2}.{ours}.{kind}"] = ([f"transformer.h.{i}.{theirs}.{kind}"], transposed)
    return names


def their_llama(section, family="Llama"):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=section.vocab_size,
        hidden_size=section.d_model,
        intermediate_size=section.d_ff,
        num_hidden_layers=section.n_layer,
        num_attention_heads=section.n_head,
        num_key_value_heads=section.n_kv_head,
        head_dim=section.d_model // section.n_head,
        max_position_embeddings=section.seq_len,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": section.rope_theta},
        tie_word_embeddings=section.tie_embeddings,
        pad_token_id=None,
    )
    return getattr(transformers, f"{family}ForCausalLM")(config)


def llama_names(section):
    last = section.n_layer + 1
    names = {
        "layers.0.weight": (["model.embed_tokens.weight"], False),
        f"layers.{last}.weight": (["model.norm.weight"], False),
    }
    if not section.tie_embeddings:
        names[f"layers.{last + 1}.weight"] = (["lm_head.weight"], False)
    for i in range(section.n_layer):
        qkv = [f"model.layers.{i}.self_attn.{x}_proj.weight" for x in "qkv"]
        names[f"layers.{i + 1}.attention.qkv.weight"] = (qkv, False)
        for ours, theirs in LLAMA_BLOCK.items():
            names[f"layers.{i + 1}.{ours}.weight"] = ([f"model.layers.{i}.{theirs}.weight"], False)
    return names


@torch.no_grad()
def copy_weights(ours, theirs, names):
    parameters, targets = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert parameters.keys() == names.keys()
    for name, (their_names, transposed) in names.items():
        value = parameters[name].t() if transposed else parameters[name]
        parts = value.split([targets[n].shape[0] for n in their_names])
        for their_name, part in zip(their_names, parts, strict=True):
            targets[their_name].copy_(part)


def assert_close(actual, expected, what):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5, f"{what}: off by {error:.1e} relative"
    assert expected.abs().max() > 0, f"{what} is zero: nothing was compared"


def assert_same(ours, theirs, names, batch):
    """Compare logits, loss and every gradient."""
    ids, labels = batch
    copy_weights(ours, theirs, names)
    theirs.train()
    output, logits = ours(ids, labels=labels), theirs(input_ids=ids).logits
    assert_close(output.logits, logits, "logits")
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert_close(output.loss, loss, "loss")
    output.loss.backward()
    loss.backward()
    targets = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        their_names, transposed = names[name]
        gradient = torch.cat([targets[n].grad for n in their_names])
        assert_close(parameter.grad, gradient.t() if transposed else gradient, name)


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2(tiny, random_gpt, batch, tied):
    section = tiny(position="learned", norm="layernorm", activation="gelu", tie_embeddings=tied)
    assert_same(random_gpt(section), their_gpt2(section), gpt2_names(section), batch)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_llama(tiny, random_gpt, batch, tied, kv_heads):
    section = tiny(activation="swiglu", tie_embeddings=tied, n_kv_head=kv_heads, rope_theta=500.0)
    assert_same(random_gpt(section), their_llama(section), llama_names(section), batch)


def test_qk_norm_equals_qwen3s_with_weights_of_one(tiny, random_gpt, batch):
    section = tiny(activation="swiglu", qk_norm=True, n_kv_head=2)
    assert_same(random_gpt(section), their_llama(section, "Qwen3"), llama_names(section), batch)
