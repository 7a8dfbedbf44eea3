"""Which of transformers' architectures computes what a GPT of ours does, and its weights under their names."""

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
    from megagpt.recipe import ModelSection

_GPT2 = {
    "attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip
_LLAMA = {
    "attention_norm": "input_layernorm", "attention.output": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip


def convert(transformers: Any, model: GPT, dtype: torch.dtype) -> Any:
    """A model of transformers' with the weights of ours, in `dtype`. Raises UserError where none is the same."""
    section = model.section
    if problem := _unknown(section):
        do = "layernorm with learned positions (GPT-2) and rmsnorm with rope (Llama, Qwen3) can be exported"
        raise UserError(f"no architecture of transformers is this model: {problem}", "model", do)
    gpt2, named = section.norm == "layernorm", dict(model.named_parameters())
    config = (_gpt2 if gpt2 else _llama)(transformers, section)
    config.dtype = dtype
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None  # the tokenizer says
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    renamed = (_gpt2_weights if gpt2 else _llama_weights)(section, named)
    theirs.load_state_dict({name: value.detach().to(dtype).contiguous() for name, value in renamed}, assign=True)
    theirs.tie_weights()
    return theirs


def _unknown(section: ModelSection) -> str:
    """What of this model no architecture has; "" where one has it all."""
    first = section.norm == "layernorm"
    if section.logit_softcap is not None:
        return f"logit_softcap: {section.logit_softcap:g}"
    if first and section.position == "rope":
        return "layernorm with rope"
    if not first and section.position == "learned":
        return "rmsnorm with learned positions"
    if first and section.qk_norm:
        return "layernorm with qk_norm"
    if first and section.n_kv_head != section.n_head:
        return "layernorm with shared key and value heads"
    activation = ACTIVATIONS[section.activation]
    known = activation.gpt2 if first else activation.llama
    return "" if known else f"{section.norm} with {section.activation}"


def _gpt2(transformers: Any, section: ModelSection) -> Any:
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
    """Our parameters under GPT-2's names. Its matrices are stored transposed."""
    last = section.n_layer + 2
    yield "transformer.wte.weight", named["layers.0.weight"]
    yield "transformer.wpe.weight", named["layers.1.weight"]
    for number in range(section.n_layer):
        for ours, theirs in _GPT2.items():
            for kind in ("weight", "bias"):
                value = named[f"layers.{number + 2}.{ours}.{kind}"]
                yield f"transformer.h.{number}.{theirs}.{kind}", value.t() if value.ndim == 2 else value
    yield "transformer.ln_f.weight", named[f"layers.{last}.weight"]
    yield "transformer.ln_f.bias", named[f"layers.{last}.bias"]
    yield "lm_head.weight", named["layers.0.weight" if section.tie_embeddings else f"layers.{last + 1}.weight"]


def _llama(transformers: Any, section: ModelSection) -> Any:
    """Llama; Qwen3 where queries and keys are normed. relu2 is relu(x)·x: a gate with the weights of the other half."""
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
    """Our parameters under Llama's names, which are Qwen3's too."""
    last = section.n_layer + 1
    yield "model.embed_tokens.weight", named["layers.0.weight"]
    for number in range(section.n_layer):
        prefix, block = f"model.layers.{number}", f"layers.{number + 1}"
        yield from _heads(section, named[f"{block}.attention.qkv.weight"], f"{prefix}.self_attn")
        for ours, theirs in _LLAMA.items():
            by_up = ours == "mlp.gate" and ACTIVATIONS[section.activation].llama_gate_is_up
            value = named[f"{block}.mlp.up.weight"].clone() if by_up else named[f"{block}.{ours}.weight"]
            yield f"{prefix}.{theirs}.weight", value
    yield "model.norm.weight", named[f"layers.{last}.weight"]
    yield "lm_head.weight", named["layers.0.weight" if section.tie_embeddings else f"layers.{last + 1}.weight"]


def _heads(section: ModelSection, rows: Tensor, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The rows [heads · head_dim, d_model] of queries, keys and values apart, and norms that change nothing: ours."""
    head = section.d_model // section.n_head
    counts = (section.n_head, section.n_kv_head, section.n_kv_head)
    parts = torch.split(rows, [count * head for count in counts])
    yield from ((f"{prefix}.{name}_proj.weight", part) for name, part in zip("qkv", parts, strict=True))
    if section.qk_norm:
        yield from ((f"{prefix}.{name}_norm.weight", rows.new_ones(head)) for name in "qk")
