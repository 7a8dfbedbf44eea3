"""Parameter shapes of a GPT, computed without torch.

The layers are built with these shapes. Parameter counts, FLOPs, tensor-parallel shards and the planner's memory
estimates are derived from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from megagpt.config.recipe import ModelSection

FP32_BYTES = 4
ADAMW_BYTES = 3 * FP32_BYTES
"""bytes per parameter of the fp32 weight and the two fp32 moments of AdamW, in the optimizer and in a checkpoint"""

Shapes = Mapping[str, tuple[int, ...]]
"""type of a mapping from the name of a parameter in `GPT` to its shape"""


class LinearShape(NamedTuple):
    """Size of one linear layer of a block, and its split under tensor parallelism.

    Attributes:
        in_features: size of the input
        out_features: size of the output
        split: "column" if the outputs are split over tensor-parallel ranks, "row" if the inputs are
        sections: sizes of the matrices that are stacked along the split dimension, each of which is split evenly

    """

    in_features: int
    out_features: int
    split: Literal["column", "row"]
    sections: tuple[int, ...]


def head_dim(section: ModelSection) -> int:
    """Return the width of one attention head."""
    return section.d_model // section.n_head


def has_bias(section: ModelSection) -> bool:
    """Return whether linear layers have biases.

    Linear layers have biases with layernorm, as in GPT-2, but not with rmsnorm, as in Llama.
    """
    return section.norm == "layernorm"


def linear_shapes(section: ModelSection) -> dict[str, LinearShape]:
    """Return the shape of each linear layer of a block by its name in the block.

    The split is the same as in Megatron (arXiv 1909.08053). The first layers of attention and of the MLP are split by
    their outputs, so that each rank holds whole heads. The second layers are split by their inputs.
    """
    width, key_width = section.d_model, section.n_kv_head * head_dim(section)
    up = LinearShape(width, section.d_ff, "column", (section.d_ff,))
    shapes = {
        "attention.qkv": LinearShape(width, width + 2 * key_width, "column", (width, key_width, key_width)),
        "attention.output": LinearShape(width, width, "row", (width,)),
    }
    if section.is_gated:
        shapes["mlp.gate"] = up
    shapes["mlp.up"] = up
    shapes["mlp.down"] = LinearShape(section.d_ff, width, "row", (section.d_ff,))
    return shapes


def layer_shapes(section: ModelSection) -> list[Shapes]:
    """Return the parameter shapes of each layer of `gpt.build_layers(section)`. A tied head has no parameters."""
    width, bias = section.d_model, has_bias(section)
    vocabulary: Shapes = {"weight": (section.vocab_size, width)}
    norm: Shapes = {"weight": (width,), "bias": (width,)} if bias else {"weight": (width,)}
    block = {f"{name}.{kind}": shape for name in ("attention_norm", "mlp_norm") for kind, shape in norm.items()}
    for name, linear in linear_shapes(section).items():
        block[f"{name}.weight"] = (linear.out_features, linear.in_features)
        if bias:
            block[f"{name}.bias"] = (linear.out_features,)
    positions: list[Shapes] = [{"weight": (section.seq_len, width)}] if section.position == "learned" else []
    head: Shapes = {} if section.tie_embeddings else vocabulary
    layers: list[Shapes] = [vocabulary, *positions, *[block] * section.n_layer, norm, head]
    return [{f"layers.{i}.{name}": shape for name, shape in layer.items()} for i, layer in enumerate(layers)]


def head_index(section: ModelSection) -> int:
    """Return the index of the head, which is the last layer."""
    return section.n_layer + (3 if section.position == "learned" else 2)
