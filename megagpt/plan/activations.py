"""What the layers keep for the backward pass, in bytes: tensor by tensor what `model/layers.py` and torch save.

The counts follow Korthikanti et al. (arXiv 2205.05198, table 2) for the layers that we have: no dropout masks, fused
attention, activations by their own formulas. tests/unit/plan/test_activations.py holds them to torch's saved tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megagpt.model import flops

if TYPE_CHECKING:
    from megagpt.config.deepspeed import Layout
    from megagpt.config.recipe import ModelSection

_FP32 = 4


@dataclass(frozen=True)
class Shape:
    """One micro-batch on one rank: how many tokens of how many sequences, and how the model is cut there."""

    section: ModelSection
    tokens: int
    tensor: int
    sequence: int
    element: int
    """bytes of an activation"""

    @classmethod
    def of(cls, section: ModelSection, layout: Layout, element: int) -> Shape:
        """The shape that a layout gives each rank."""
        tokens = layout.micro_batch * section.seq_len // layout.sequence_parallel
        return cls(section, tokens, layout.tensor_parallel, layout.sequence_parallel, element)

    @property
    def hidden(self) -> int:
        """One tensor of the residual stream."""
        return self.tokens * self.section.d_model * self.element

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding on this rank: cut where their number divides."""
        rows = self.section.vocab_size
        return rows if rows % self.tensor else rows // self.tensor


def block(shape: Shape) -> int:
    """What a block keeps that is not recomputed; its input among it."""
    norms = 2 * (2 * shape.hidden + _statistics(shape))  # input and output of both
    return norms + _attention(shape) + _mlp(shape)


def recomputed_block(shape: Shape) -> int:
    """What a block keeps of which all else is computed again (arXiv 1604.06174)."""
    return shape.hidden


def working(shape: Shape) -> int:
    """What a block's backward pass takes on top of what was kept, at its activation: more comes than can go."""
    inside = 2 if shape.section.activation == "swiglu" else 1
    return shape.hidden + inside * shape.tokens * (shape.section.d_ff // shape.tensor) * shape.element


def final_norm(shape: Shape) -> int:
    """Its input; its output is not kept by the head."""
    return shape.hidden + _statistics(shape)


def head_kept(shape: Shape) -> int:
    """The two gradients that the loss makes in its forward pass (model/loss.py): that of the matrix is in fp32."""
    return shape.hidden + _FP32 * shape.vocabulary * shape.section.d_model


def head_passing(shape: Shape, on_cpu: bool) -> int:
    """What else is alive at the loss's worst moment, in the forward pass or the backward one.

    Forward: hidden, a chunk's logits, its probabilities in fp32 and their gradient, and its part of the matrix's.
    Backward: the matrix's gradient scaled, and again in the weights' dtype.
    """
    chunks = -(-shape.tokens // flops.chunk_tokens(shape.vocabulary, on_cpu))
    tokens = -(-shape.tokens // chunks)
    of_chunk = tokens * shape.vocabulary
    matrix = shape.vocabulary * shape.section.d_model
    cast = shape.element if shape.element < _FP32 else 0
    product = matrix * (shape.element + (_FP32 if cast and chunks > 1 else 0)) if chunks > 1 or cast else 0
    inside = of_chunk * (
        shape.element + _FP32 * (2 if shape.tensor > 1 else 1)
    )  # a share is shifted before its softmax
    outside = of_chunk * (shape.element + _FP32 + cast) + product
    rows = shape.hidden + tokens * shape.section.d_model * shape.element
    return max(rows + max(inside, outside), matrix * (_FP32 + cast))


def _statistics(shape: Shape) -> int:
    """One number a token for rmsnorm, two for layernorm, in fp32."""
    return shape.tokens * _FP32 * (2 if shape.section.norm == "layernorm" else 1)


def _attention(shape: Shape) -> int:
    section = shape.section
    head = section.d_model // section.n_head
    queries, keys = section.d_model // shape.tensor, section.n_kv_head * head // shape.tensor
    kept = queries + 2 * keys  # q, k and v
    if section.position == "rope" or section.qk_norm:
        # q and k are new tensors then, and v is a view of what they were made of
        kept += 0 if shape.sequence > 1 else queries + keys
    kept += queries * (2 if shape.sequence > 1 else 1)  # mixed values, before and after the exchange
    scores = section.n_head // shape.tensor * _FP32  # the logarithm of each query's sum, which the fused kernel keeps
    norms = (section.n_head + section.n_kv_head) // shape.tensor * _FP32 if section.qk_norm else 0
    if section.qk_norm and shape.sequence > 1:
        kept += queries + keys  # the norm keeps its output, and the exchange copies it
    return shape.tokens * (kept * shape.element + scores + norms)


def _mlp(shape: Shape) -> int:
    """gelu: input and output; relu2: the positive part and its square; swiglu: gate, its silu, up, their product."""
    tensors = 4 if shape.section.activation == "swiglu" else 2
    return tensors * shape.tokens * (shape.section.d_ff // shape.tensor) * shape.element
