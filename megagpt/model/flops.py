"""What a model costs: its parameters one by one, FLOPs, and how to share them out, by arithmetic alone (no torch)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megagpt.config.recipe import ModelSection


_SMALLEST_CHUNK = 512  # tokens; below it the matrix products lose more than the memory gains
MATRICES_AT_ONCE = 1 << 24
"""Elements of matrices that Muon orthogonalises together, unless one has more: enough to keep a device busy"""


def _linears_per_block(section: ModelSection) -> list[tuple[int, int]]:
    """(inputs, outputs) of every linear layer of one block."""
    width, head_dim = section.d_model, section.d_model // section.n_head
    up = [(width, section.d_ff)] * (2 if section.activation == "swiglu" else 1)
    qkv = (width, (section.n_head + 2 * section.n_kv_head) * head_dim)
    return [qkv, (width, width), *up, (section.d_ff, width)]


Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each parameter, by its name in `GPT`."""


def shapes(section: ModelSection) -> list[Shapes]:
    """The parameters of each of `gpt.layers(section)`; a tied head has none of its own."""
    width, biased = section.d_model, section.norm == "layernorm"
    vocabulary: Shapes = {"weight": (section.vocab_size, width)}
    norm: Shapes = {"weight": (width,), **({"bias": (width,)} if biased else {})}
    names = ["attention.qkv", "attention.output", *(["mlp.gate"] if section.activation == "swiglu" else [])]
    block = {f"{place}.{kind}": shape for place in ("attention_norm", "mlp_norm") for kind, shape in norm.items()}
    for name, (inputs, outputs) in zip([*names, "mlp.up", "mlp.down"], _linears_per_block(section), strict=True):
        block |= {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if biased else {})}
    positions: list[Shapes] = [{"weight": (section.seq_len, width)}] if section.position == "learned" else []
    head: Shapes = {} if section.tie_embeddings else vocabulary
    layers: list[Shapes] = [vocabulary, *positions, *[block] * section.n_layer, norm, head]
    return [{f"layers.{i}.{name}": shape for name, shape in layer.items()} for i, layer in enumerate(layers)]


def parameters(section: ModelSection) -> int:
    """The number of parameters, a tied matrix counted once."""
    return sum(math.prod(shape) for layer in shapes(section) for shape in layer.values())


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


def boundaries(costs: Sequence[float], stages: int) -> list[int]:
    """The first layer of each stage, and the number of layers: [stages + 1], every stage with a layer at least.

    The dearest stage is as cheap as can be; among equals, the one before it, and so on.
    """
    return list(_boundaries(tuple(costs), stages))


@lru_cache(maxsize=64)  # the planner asks the same a hundred times, and each takes up to a second
def _boundaries(costs: tuple[float, ...], stages: int) -> list[int]:
    # best[n]: the layers from n on, cut into as many stages as the loop has counted: (costs falling, cuts)
    total = len(costs)
    best = {n: ([sum(costs[n:])], [n, total]) for n in range(total)}
    for count in range(2, stages + 1):
        best = {
            n: min(
                (sorted([sum(costs[n:cut]), *loads], reverse=True), [n, *cuts])
                for cut, (loads, cuts) in best.items()
                if cut > n
            )
            for n in range(total - count + 1)
        }
    return best[0][1]


def layer_kinds(section: ModelSection) -> list[str]:
    """Return the kind of each of `gpt.layers(section)`: embedding, positions, block, norm or head."""
    positions = ["positions"] if section.position == "learned" else []
    return ["embedding", *positions, *["block"] * section.n_layer, "norm", "head"]


def stage_kinds(section: ModelSection, stages: int) -> list[tuple[str, ...]]:
    """Return the kinds of layer that each pipeline stage holds, each kind once, in the model's order.

    The kinds of a stage decide which parameter groups it has and what it receives and sends.
    """
    kinds, cuts = layer_kinds(section), boundaries(layer_costs(section), stages)
    return [tuple(dict.fromkeys(kinds[first:end])) for first, end in pairwise(cuts)]


def chunk_tokens(rows: int, on_cpu: bool) -> int:
    """For how many tokens the loss holds logits at a time, of a vocabulary (or a share of one) of so many rows."""
    logits = 1 << 21 if on_cpu else 1 << 26  # 8 MiB suit a cache, 256 MiB fill a GPU
    return max(_SMALLEST_CHUNK, logits // rows)


# dense bf16 and fp16 with sums in fp32, TFLOP/s, by words of torch's name of a device: data sheets of NVIDIA and AMD,
# without sparsity. The first that fits holds: the slower forms of a chip come before its SXM form
_PEAKS = {
    "V100-PCIE": 112, "V100": 125, "A100": 312, "A800": 312, "A30": 165, "A10": 125, "A40": 149.7, "RTX A6000": 154.8,
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800 PCIe": 756, "H800": 989, "H200 NVL": 835, "H200": 989,
    "GH200": 989, "B200": 2250, "GB200": 2500, "L4": 121, "L40": 181, "L40S": 362, "RTX 3090": 71, "RTX 4090": 165.2,
    "MI250X": 383, "MI300X": 1307,
}  # fmt: skip


def peak_flops(device: str, precision: str) -> float | None:
    """Peak FLOP/s of a device by its name, for utilisation; None where it is not known, rather than a wrong figure."""
    if precision == "fp32" or (precision == "bf16" and "V100" in device):  # which has no units for it
        return None
    fits = (peak for name, peak in _PEAKS.items() if re.search(rf"\b{name}\b", device))
    return next((peak * 1e12 for peak in fits), None)
