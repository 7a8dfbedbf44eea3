"""Number of parameters, FLOPs and balanced pipeline stages of a model, and peak FLOP/s of devices, without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

from megagpt.model.shapes import ADAMW_BYTES, layer_shapes, linear_shapes

if TYPE_CHECKING:
    from megagpt.config.recipe import ModelSection


CHECKPOINT_HEADROOM = 1.2
"""free disk space that a save requires, as a multiple of the checkpoint's size"""
# Smallest number of tokens whose logits are computed at once. With fewer tokens, matrix products become much slower.
_SMALLEST_CHUNK = 512
MATRICES_AT_ONCE = 1 << 24
"""number of elements in the matrices that Muon orthogonalizes in one batch, which is enough to keep a device busy

A matrix with more elements is a batch of its own.
"""


def _block_matrix_elements(section: ModelSection) -> int:
    return sum(linear.in_features * linear.out_features for linear in linear_shapes(section).values())


def parameters(section: ModelSection) -> int:
    """Return the number of parameters of the model. A tied matrix counts once."""
    return sum(math.prod(shape) for layer in layer_shapes(section) for shape in layer.values())


def checkpoint_bytes(section: ModelSection) -> int:
    """Return the size in bytes of a checkpoint that contains the weights and AdamW's moments."""
    return ADAMW_BYTES * parameters(section)


def matmul_parameters(section: ModelSection) -> int:
    """Return the number of parameters that take part in matrix products (the blocks' linear layers and the head)."""
    block = _block_matrix_elements(section)
    return section.n_layer * block + section.vocab_size * section.d_model


def flops_per_token(section: ModelSection) -> float:
    """Return the FLOPs of a forward and backward pass per token: 6·N + 12·L·d·T (PaLM, arXiv 2204.02311, appendix B).

    N is the number of matmul parameters, L the number of layers, d the width and T the sequence length. The masked half
    of the attention matrix is counted, as in the figures that other trainers publish. Recomputation is not counted.
    """
    return 6.0 * matmul_parameters(section) + 12.0 * section.n_layer * section.d_model * section.seq_len


def layer_costs(section: ModelSection) -> list[float]:
    """Return the cost of each layer of `gpt.build_layers(section)`, by which pipeline stages are balanced.

    The cost is the number of FLOPs per token, as in `flops_per_token`, plus one per parameter. The additional cost
    accounts for the optimizer state, which an embedding also has, although it needs no matrix product.
    """
    width = section.d_model
    matrices = _block_matrix_elements(section)
    vocabulary = section.vocab_size * width
    positions = [float(section.seq_len * width)] if section.position == "learned" else []
    block = 7.0 * matrices + 12.0 * width * section.seq_len
    head = 6.0 * vocabulary + (0 if section.tie_embeddings else vocabulary)
    return [float(vocabulary), *positions, *[block] * section.n_layer, float(width), head]


def boundaries(costs: Sequence[float], stages: int) -> list[int]:
    """Split layers into pipeline stages of at least one layer each.

    The split minimizes the cost of the most expensive stage. Among splits that are equal in this respect, it minimizes
    the cost of the second most expensive stage, and so on.

    Args:
        costs: cost of each layer
        stages: number of stages

    Returns:
        The index of the first layer of each stage, followed by the number of layers.

    """
    return list(_boundaries(tuple(costs), stages))


# A call takes up to a second, and the planner makes about a hundred calls with equal arguments.
@lru_cache(maxsize=64)
def _boundaries(costs: tuple[float, ...], stages: int) -> list[int]:
    # best[n] is the best split of the layers from index n on into `count` stages. It consists of the costs of the
    # stages in descending order, and of the boundaries.
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
    """Return the kind of each layer of `gpt.build_layers(section)`: embedding, positions, block, norm or head."""
    positions = ["positions"] if section.position == "learned" else []
    return ["embedding", *positions, *["block"] * section.n_layer, "norm", "head"]


def stage_kinds(section: ModelSection, stages: int) -> list[tuple[str, ...]]:
    """Return the kinds of layers that each pipeline stage holds. Each kind is listed once, in the model's order.

    The kinds of layers on a stage determine its parameter groups and the tensors that it sends and receives.
    """
    kinds, cuts = layer_kinds(section), boundaries(layer_costs(section), stages)
    return [tuple(dict.fromkeys(kinds[first:end])) for first, end in pairwise(cuts)]


def chunk_tokens(rows: int, on_cpu: bool) -> int:
    """Return the number of tokens whose logits the loss computes at once.

    Args:
        rows: number of token ids in the vocabulary, or in this rank's shard of it
        on_cpu: whether the device is a CPU

    """
    # On a CPU, 8 MiB of logits fit into the cache. On a GPU, 256 MiB are enough to keep the GPU busy.
    logits = 1 << 21 if on_cpu else 1 << 26
    return max(_SMALLEST_CHUNK, logits // rows)


# Peak TFLOP/s of dense bf16 and fp16 products with fp32 accumulation, from the data sheets of NVIDIA and AMD. Each key
# is a part of torch's device name. The first match counts, so slower variants of a chip must precede its SXM variant.
_PEAKS = {
    "V100-PCIE": 112, "V100": 125, "A100": 312, "A800": 312, "A30": 165, "A10": 125, "A40": 149.7, "RTX A6000": 154.8,
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800 PCIe": 756, "H800": 989, "H200 NVL": 835, "H200": 989,
    "GH200": 989, "B200": 2250, "GB200": 2500, "L4": 121, "L40": 181, "L40S": 362, "RTX 3090": 71, "RTX 4090": 165.2,
    "MI250X": 383, "MI300X": 1307,
}  # fmt: skip


def peak_flops(device: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a device, from which the model FLOPs utilization is computed.

    Args:
        device: name of the device
        precision: precision of the model: fp32, bf16 or fp16

    Returns:
        The peak in FLOP/s, or None if it is not known.

    """
    if precision == "fp32" or (precision == "bf16" and "V100" in device):  # the V100 has no bf16 units
        return None
    matches = (peak for name, peak in _PEAKS.items() if re.search(rf"\b{name}\b", device))
    return next((peak * 1e12 for peak in matches), None)
