"""Shapes of published models, by name. A recipe's own keys override those of its preset.

Dropout is 0 in all presets, even if the published model used it, because loss curves are equal on all layouts only
without dropout.
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
    """Return the shape of a GPT-2.

    It has learned positions, layernorm, gelu (tanh form), a tied head, 50,257 tokens and a context of 1,024 tokens.
    """
    return {
        "n_layer": n_layer, "n_head": n_head, "d_model": d_model, "vocab_size": 50257, "seq_len": 1024,
        "position": "learned", "norm": "layernorm", "activation": "gelu", "tie_embeddings": True,
    }  # fmt: skip


def _gpt3(n_layer: int, n_head: int, d_model: int) -> _Shape:
    """Return the shape of a GPT-3: that of GPT-2 with a context of 2,048 tokens (Brown et al. 2020, section 2.1)."""
    return {**_gpt2(n_layer, n_head, d_model), "seq_len": 2048}


def _llama(n_layer: int, n_head: int, n_kv_head: int, d_model: int, d_ff: int, seq_len: int) -> _Shape:
    """Return the shape of a Llama: rotary positions, rmsnorm, swiglu, an untied head, no biases and 32,000 tokens."""
    return {
        "n_layer": n_layer, "n_head": n_head, "n_kv_head": n_kv_head, "d_model": d_model, "d_ff": d_ff,
        "vocab_size": 32000, "seq_len": seq_len, "position": "rope", "rope_theta": 10_000.0,
        "norm": "rmsnorm", "activation": "swiglu", "tie_embeddings": False,
    }  # fmt: skip


PRESETS: Mapping[str, _Shape] = {
    "quickstart": _QUICKSTART,
    # Source: config.json of openai-community/gpt2, gpt2-medium, gpt2-large and gpt2-xl on Hugging Face.
    # Radford et al. 2019, table 2, list these models with 117M to 1542M parameters.
    "gpt2-124m": _gpt2(12, 12, 768),
    "gpt2-355m": _gpt2(24, 16, 1024),
    "gpt2-774m": _gpt2(36, 20, 1280),
    "gpt2-1.5b": _gpt2(48, 25, 1600),
    # Source: Brown et al. 2020, table 2.1. All blocks have dense attention here. In GPT-3, every other block is sparse.
    "gpt3-2.7b": _gpt3(32, 32, 2560),
    "gpt3-6.7b": _gpt3(32, 32, 4096),
    # The table lists a width of 5140, which contradicts its own 40 heads of dimension 128.
    "gpt3-13b": _gpt3(40, 40, 5120),
    "gpt3-175b": _gpt3(96, 96, 12288),
    # Source: config.json of TinyLlama/TinyLlama_v1.1 on Hugging Face.
    "llama-1b": _llama(22, 32, 4, 2048, 5632, seq_len=2048),
    # Source: config.json of meta-llama/Llama-2-7b-hf and -70b-hf on Hugging Face (Touvron et al. 2023b, table 1).
    "llama-7b": _llama(32, 32, 32, 4096, 11008, seq_len=4096),
    "llama-70b": _llama(80, 64, 8, 8192, 28672, seq_len=4096),
}
