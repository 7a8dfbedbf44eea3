"""Costs of a model, computed without torch: number of parameters, FLOPs, pipeline stages, peak FLOP/s of devices."""

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
_SMALLEST_CHUNK = 512  # tokens; with fewer, matrix products get slower by more than the saved memory is worth
MATRICES_AT_ONCE = 1 << 24
"""number of elements of the matrices that Muon orthogonalizes in one batch, enough to keep a device busy; a larger
matrix is a batch of its own"""


def _block_matrix_elements(section: ModelSection) -> int:
    return sum(linear.in_features * linear.out_features for linear in linear_shapes(section).values())


def parameters(section: ModelSection) -> int:
    """Return the number of parameters. A tied matrix counts once."""
    return sum(math.prod(shape) for layer in layer_shapes(section) for shape in layer.values())


def checkpoint_bytes(section: ModelSection) -> int:
    """Return the size of a checkpoint of weights and AdamW's moments in bytes."""
    return ADAMW_BYTES * parameters(section)


def matmul_parameters(section: ModelSection) -> int:
    """Return the number of parameters in matrix products: the blocks' linear layers and the head."""
    block = _block_matrix_elements(section)
    return section.n_layer * block + section.vocab_size * section.d_model


def flops_per_token(section: ModelSection) -> float:
    """Return the FLOPs of training per token, forward and backward: 6·N + 12·L·d·T (PaLM, arXiv 2204.02311, B).

    N = matmul parameters, L = layers, d = width, T = seq_len. The masked half of attention is not subtracted, as in
    the figures that other trainers publish. Recomputation is not counted.
    """
    return 6.0 * matmul_parameters(section) + 12.0 * section.n_layer * section.d_model * section.seq_len


def layer_costs(section: ModelSection) -> list[float]:
    """Return the cost of each layer of `gpt.build_layers(section)` in FLOPs per token, to balance pipeline stages.

    Forward and backward count as in `flops_per_token`, and each parameter adds one. An embedding is looked up and
    not multiplied, but its optimizer state has to be updated and stored like any other.
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

    The most expensive stage is as cheap as possible. Among equal splits, the second most expensive one is, and so on.

    Args:
        costs: cost of each layer
        stages: number of stages

    Returns:
        The first layer of each stage, and the number of layers: [stages + 1].

    """
    return list(_boundaries(tuple(costs), stages))


@lru_cache(maxsize=64)  # the planner calls it a hundred times with equal arguments, and it takes up to a second
def _boundaries(costs: tuple[float, ...], stages: int) -> list[int]:
    # best[n]: best split of the layers from n on into `count` stages: (costs of the stages in descending order, splits)
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
    """Return the kind of each of `gpt.build_layers(section)`: embedding, positions, block, norm or head."""
    positions = ["positions"] if section.position == "learned" else []
    return ["embedding", *positions, *["block"] * section.n_layer, "norm", "head"]


def stage_kinds(section: ModelSection, stages: int) -> list[tuple[str, ...]]:
    """Return the kinds of layer that each pipeline stage holds, each kind once, in the model's order.

    The kinds of a stage decide which parameter groups it has and what it receives and sends.
    """
    kinds, cuts = layer_kinds(section), boundaries(layer_costs(section), stages)
    return [tuple(dict.fromkeys(kinds[first:end])) for first, end in pairwise(cuts)]


def chunk_tokens(rows: int, on_cpu: bool) -> int:
    """Return the number of tokens whose logits the loss computes at once.

    Args:
        rows: rows of the vocabulary, or of this rank's shard of it
        on_cpu: the device is a CPU

    """
    logits = 1 << 21 if on_cpu else 1 << 26  # 8 MiB fit into a cache, 256 MiB keep a GPU busy
    return max(_SMALLEST_CHUNK, logits // rows)


# Dense bf16 and fp16 with fp32 accumulation in TFLOP/s, without sparsity, from the data sheets of NVIDIA and AMD. Keys
# are parts of torch's device names. The first match counts, so that slower variants of a chip precede its SXM variant.
_PEAKS = {
    "V100-PCIE": 112, "V100": 125, "A100": 312, "A800": 312, "A30": 165, "A10": 125, "A40": 149.7, "RTX A6000": 154.8,
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800 PCIe": 756, "H800": 989, "H200 NVL": 835, "H200": 989,
    "GH200": 989, "B200": 2250, "GB200": 2500, "L4": 121, "L40": 181, "L40S": 362, "RTX 3090": 71, "RTX 4090": 165.2,
    "MI250X": 383, "MI300X": 1307,
}  # fmt: skip


def peak_flops(device: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a device, from which utilization is computed.

    Args:
        device: name of the device
        precision: fp32, bf16 or fp16

    Returns:
        The peak, or None if it is not known.

    """
    if precision == "fp32" or (precision == "bf16" and "V100" in device):  # V100 has no bf16 units
        return None
    matches = (peak for name, peak in _PEAKS.items() if re.search(rf"\b{name}\b", device))
    return next((peak * 1e12 for peak in matches), None)
