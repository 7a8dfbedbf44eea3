"""Model shapes of published models, by name. A recipe's own keys override those of its preset.

Dropout is 0 in all of them, even where the published model used dropout: loss curves are equal on all layouts only
without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_Shape = Mapping[str, Any]

# A small model with the settings that learn fastest per update, for a first run of ten minutes on a CPU.
_QUICKSTART: _Shape = {
    "n_layer": 4, "n_head": 2, "d_model": 128, "vocab_size": 4096, "seq_len": 128,
    "position": "rope", "norm": "rmsnorm", "activation": "relu2",
    "qk_norm": True, "tie_embeddings": False, "init": "zero_projections",
}  # fmt: skip


def _gpt2(n_layer: int, n_head: int, d_model: int) -> _Shape:
    """GPT-2: learned positions, layernorm, gelu (tanh form), tied head, 50,257 tokens, context of 1,024."""
    return {
        "n_layer": n_layer, "n_head": n_head, "d_model": d_model, "vocab_size": 50257, "seq_len": 1024,
        "position": "learned", "norm": "layernorm", "activation": "gelu", "tie_embeddings": True,
    }  # fmt: skip


def _gpt3(n_layer: int, n_head: int, d_model: int) -> _Shape:
    """GPT-3: GPT-2's architecture and vocabulary, context of 2,048 tokens (Brown et al. 2020, section 2.1)."""
    return {**_gpt2(n_layer, n_head, d_model), "seq_len": 2048}


def _llama(n_layer: int, n_head: int, n_kv_head: int, d_model: int, d_ff: int, seq_len: int) -> _Shape:
    """Llama: rotary positions, rmsnorm, swiglu, untied head, no biases, 32,000 tokens."""
    return {
        "n_layer": n_layer, "n_head": n_head, "n_kv_head": n_kv_head, "d_model": d_model, "d_ff": d_ff,
        "vocab_size": 32000, "seq_len": seq_len, "position": "rope", "rope_theta": 10_000.0,
        "norm": "rmsnorm", "activation": "swiglu", "tie_embeddings": False,
    }  # fmt: skip


PRESETS: Mapping[str, _Shape] = {
    "quickstart": _QUICKSTART,
    # Hugging Face openai-community/gpt2, -medium, -large, -xl: config.json
    # (Radford et al. 2019, table 2, lists them as 117M to 1542M parameters).
    "gpt2-124m": _gpt2(12, 12, 768),
    "gpt2-355m": _gpt2(24, 16, 1024),
    "gpt2-774m": _gpt2(36, 20, 1280),
    "gpt2-1.5b": _gpt2(48, 25, 1600),
    # Brown et al. 2020, table 2.1. Attention is dense in every block; in GPT-3 every other block was sparse.
    "gpt3-2.7b": _gpt3(32, 32, 2560),
    "gpt3-6.7b": _gpt3(32, 32, 4096),
    "gpt3-13b": _gpt3(40, 40, 5120),  # the table has 5140, which contradicts its own 40 heads of 128
    "gpt3-175b": _gpt3(96, 96, 12288),
    # Hugging Face TinyLlama/TinyLlama_v1.1: config.json
    "llama-1b": _llama(22, 32, 4, 2048, 5632, seq_len=2048),
    # Hugging Face meta-llama/Llama-2-7b-hf and -70b-hf: config.json (Touvron et al. 2023b, table 1)
    "llama-7b": _llama(32, 32, 32, 4096, 11008, seq_len=4096),
    "llama-70b": _llama(80, 64, 8, 8192, 28672, seq_len=4096),
}
