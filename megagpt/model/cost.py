"""What a model costs: exact parameter counts and FLOPs, by arithmetic alone (no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megagpt.recipe import ModelSection


def _linears_per_block(section: ModelSection) -> list[tuple[int, int]]:
    """(inputs, outputs) of every linear layer of one block."""
    width, head_dim = section.d_model, section.d_model // section.n_head
    up = [(width, section.d_ff)] * (2 if section.activation == "swiglu" else 1)
    qkv = (width, (section.n_head + 2 * section.n_kv_head) * head_dim)
    return [qkv, (width, width), *up, (section.d_ff, width)]


def parameters(section: ModelSection) -> int:
    """The number of parameters, a tied matrix counted once."""
    biased = section.norm == "layernorm"
    linears = _linears_per_block(section)
    norm = section.d_model * (2 if biased else 1)
    block = sum(i * o for i, o in linears) + (sum(o for _, o in linears) if biased else 0) + 2 * norm
    vocabulary = section.vocab_size * section.d_model * (1 if section.tie_embeddings else 2)
    positions = section.seq_len * section.d_model if section.position == "learned" else 0
    return section.n_layer * block + norm + vocabulary + positions


def matmul_parameters(section: ModelSection) -> int:
    """Parameters that take part in a matrix product: the blocks' linear layers and the head."""
    block = sum(i * o for i, o in _linears_per_block(section))
    return section.n_layer * block + section.vocab_size * section.d_model


def flops_per_token(section: ModelSection) -> float:
    """FLOPs of training on one token, forward and backward: 6·N + 12·L·d·T (PaLM, arXiv 2204.02311, B).

    N = matmul parameters, L = layers, d = width, T = seq_len. The masked half of attention is not
    subtracted, as in the figures that other trainers publish; recomputation is not counted.
    """
    return 6.0 * matmul_parameters(section) + 12.0 * section.n_layer * section.d_model * section.seq_len


def layer_costs(section: ModelSection) -> list[float]:
    """The cost of each of `gpt.layers(section)`, to balance pipeline stages by; FLOPs per token.

    Forward and backward as in `flops_per_token`, and one more for each parameter: an embedding is looked up
    and not multiplied, but its optimizer state is updated and held like any other.
    """
    width = section.d_model
    held = sum(i * o for i, o in _linears_per_block(section))
    vocabulary = section.vocab_size * width
    positions = [float(section.seq_len * width)] if section.position == "learned" else []
    block = 7.0 * held + 12.0 * width * section.seq_len
    head = 6.0 * vocabulary + (0 if section.tie_embeddings else vocabulary)
    return [float(vocabulary), *positions, *[block] * section.n_layer, float(width), head]


# dense bf16 and fp16, FLOP/s: NVIDIA's data sheets (SXM forms), without sparsity
_PEAKS = {"V100": 125e12, "A100": 312e12, "A800": 312e12, "H100": 989e12, "H800": 989e12, "H200": 989e12}


def peak_flops(device: str, precision: str) -> float | None:
    """Peak FLOP/s of a device by its name, for utilisation; None where it is not known, rather than a wrong figure."""
    if precision == "fp32":
        return None
    return next((peak for name, peak in _PEAKS.items() if name in device), None)
