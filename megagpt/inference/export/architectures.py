"""Converts our GPT to the equivalent architecture of transformers, which is GPT-2, Llama or Qwen3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megagpt.errors import UserError
from megagpt.model.activations import ACTIVATIONS
from megagpt.model.attention import EPSILON
from megagpt.model.gpt import GPT

if TYPE_CHECKING:
    from megagpt.config.recipe import ModelSection

_GPT2 = {
    "attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip
_LLAMA = {
    "attention_norm": "input_layernorm", "attention.output": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip


def convert(transformers: Any, model: GPT, dtype: torch.dtype) -> Any:
    """Return a transformers model with our weights.

    Args:
        transformers: the imported package `transformers`.
        model: model to convert.
        dtype: type of the weights of the new model.

    Returns:
        The transformers model.

    Raises:
        UserError: no architecture of transformers is equivalent to the model.
    """
    section = model.section
    if problem := _unsupported_feature(section):
        do = "layernorm with learned positions (GPT-2) and rmsnorm with rope (Llama, Qwen3) can be exported"
        raise UserError(f"transformers has no equivalent architecture: {problem}", "model", do)
    named = dict(model.named_parameters())
    if section.norm == "layernorm":
        config = _gpt2_config(transformers, section)
        weights = _gpt2_weights(section, named)
    else:
        config = _llama_config(transformers, section)
        weights = _llama_weights(section, named)
    config.dtype = dtype
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None  # the tokenizer defines these ids
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict({name: value.detach().to(dtype).contiguous() for name, value in weights}, assign=True)
    theirs.tie_weights()
    return theirs


def _unsupported_feature(section: ModelSection) -> str:
    """Return a feature of the model that prevents its conversion, or "" if the model can be converted."""
    layernorm = section.norm == "layernorm"
    if section.logit_softcap is not None:
        return f"logit_softcap: {section.logit_softcap:g}"
    if layernorm and section.position == "rope":
        return "layernorm with rope"
    if not layernorm and section.position == "learned":
        return "rmsnorm with learned positions"
    if layernorm and section.qk_norm:
        return "layernorm with qk_norm"
    if layernorm and section.n_kv_head != section.n_head:
        return "layernorm with shared key and value heads"
    activation = ACTIVATIONS[section.activation]
    known = activation.gpt2 if layernorm else activation.llama
    return "" if known else f"{section.norm} with {section.activation}"


def _gpt2_config(transformers: Any, section: ModelSection) -> Any:
    return transformers.GPT2Config(
        vocab_size=section.vocab_size,
        n_positions=section.seq_len,
        n_embd=section.d_model,
        n_layer=section.n_layer,
        n_head=section.n_head,
        n_inner=section.d_ff,
        activation_function=ACTIVATIONS[section.activation].gpt2,
        layer_norm_epsilon=EPSILON,
        tie_word_embeddings=section.tie_embeddings,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), section.dropout),
    )


def _gpt2_weights(section: ModelSection, named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield our parameters under the names of GPT-2, which stores its matrices transposed."""
    final_norm = section.n_layer + 2
    yield "transformer.wte.weight", named["layers.0.weight"]
    yield "transformer.wpe.weight", named["layers.1.weight"]
    for number in range(section.n_layer):
        for ours, theirs in _GPT2.items():
            for kind in ("weight", "bias"):
                value = named[f"layers.{number + 2}.{ours}.{kind}"]
                yield f"transformer.h.{number}.{theirs}.{kind}", value.t() if value.ndim == 2 else value
    yield "transformer.ln_f.weight", named[f"layers.{final_norm}.weight"]
    yield "transformer.ln_f.bias", named[f"layers.{final_norm}.bias"]
    yield "lm_head.weight", named["layers.0.weight" if section.tie_embeddings else f"layers.{final_norm + 1}.weight"]


def _llama_config(transformers: Any, section: ModelSection) -> Any:
    """Return a Llama configuration, or a Qwen3 configuration if the model uses qk_norm.

    The activation relu2(x) = relu(x)·x is exported as a gated MLP with a relu gate and equal gate and up weights.
    """
    family = "Qwen3" if section.qk_norm else "Llama"
    return getattr(transformers, f"{family}Config")(
        vocab_size=section.vocab_size,
        hidden_size=section.d_model,
        intermediate_size=section.d_ff,
        num_hidden_layers=section.n_layer,
        num_attention_heads=section.n_head,
        num_key_value_heads=section.n_kv_head,
        head_dim=section.d_model // section.n_head,
        hidden_act=ACTIVATIONS[section.activation].llama,
        max_position_embeddings=section.seq_len,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": section.rope_theta},
        tie_word_embeddings=section.tie_embeddings,
    )


def _llama_weights(section: ModelSection, named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield our parameters under the names that Llama and Qwen3 share."""
    final_norm = section.n_layer + 1
    yield "model.embed_tokens.weight", named["layers.0.weight"]
    for number in range(section.n_layer):
        prefix, block = f"model.layers.{number}", f"layers.{number + 1}"
        yield from _heads(section, named[f"{block}.attention.qkv.weight"], f"{prefix}.self_attn")
        for ours, theirs in _LLAMA.items():
            by_up = ours == "mlp.gate" and ACTIVATIONS[section.activation].llama_gate_is_up
            value = named[f"{block}.mlp.up.weight"].clone() if by_up else named[f"{block}.{ours}.weight"]
            yield f"{prefix}.{theirs}.weight", value
    yield "model.norm.weight", named[f"layers.{final_norm}.weight"]
    yield "lm_head.weight", named["layers.0.weight" if section.tie_embeddings else f"layers.{final_norm + 1}.weight"]


def _heads(section: ModelSection, rows: Tensor, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Split the qkv weight, and yield the weights of the query, key and value projections.

    With qk_norm, also yield the weights of the query and key norms, which are 1.

    Args:
        section: configuration of the model.
        rows: qkv weight, whose rows are those of the queries, keys and values, [rows, d_model].
        prefix: prefix of the names of the yielded weights.
    """
    head_dim = section.d_model // section.n_head
    counts = (section.n_head, section.n_kv_head, section.n_kv_head)
    parts = torch.split(rows, [count * head_dim for count in counts])
    yield from ((f"{prefix}.{name}_proj.weight", part) for name, part in zip("qkv", parts, strict=True))
    if section.qk_norm:
        yield from ((f"{prefix}.{name}_norm.weight", rows.new_ones(head_dim)) for name in "qk")
