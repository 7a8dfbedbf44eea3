"""Memory of the tensors that the layers in `model/` save for the backward pass.

The counts follow Korthikanti et al. (arXiv 2205.05198, table 2), adapted to these layers. They have no dropout masks,
use fused attention, and save the tensors of activation functions that model/activations.py lists.
tests/unit/plan/test_activations.py compares the counts with the tensors that torch saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megagpt.model import flops
from megagpt.model.activations import ACTIVATIONS
from megagpt.model.shapes import FP32_BYTES

if TYPE_CHECKING:
    from megagpt.config.deepspeed import Layout
    from megagpt.config.recipe import ModelSection


@dataclass(frozen=True)
class MicroBatchShape:
    """Size of one micro-batch on one rank, and the degrees by which the model is split."""

    section: ModelSection
    tokens: int
    """number of tokens of all sequences on this rank"""
    tensor_parallel: int
    sequence_parallel: int
    element: int
    """bytes per activation"""

    @classmethod
    def of(cls, section: ModelSection, layout: Layout, element: int) -> MicroBatchShape:
        """Return the shape of the micro-batches on the ranks of a layout.

        Args:
            section: the shape of the model.
            layout: the layout of the run.
            element: bytes per activation.
        """
        tokens = layout.micro_batch * section.seq_len // layout.sequence_parallel
        return cls(section, tokens, layout.tensor_parallel, layout.sequence_parallel, element)

    @property
    def hidden(self) -> int:
        """Bytes of one tensor of hidden states."""
        return self.tokens * self.section.d_model * self.element

    @property
    def vocab_rows(self) -> int:
        """Number of rows of the vocabulary matrix on this rank. They are split only if their number is divisible."""
        rows = self.section.vocab_size
        return rows if rows % self.tensor_parallel else rows // self.tensor_parallel


def block(shape: MicroBatchShape) -> int:
    """Return the bytes that a block saves if it is not recomputed, including its input."""
    norms = 2 * (2 * shape.hidden + _norm_statistics(shape))  # Both norms save their input and output.
    return norms + _attention(shape) + _mlp(shape)


def recomputed_block(shape: MicroBatchShape) -> int:
    """Return the bytes that a recomputed block saves, which are those of its input (arXiv 1604.06174)."""
    return shape.hidden


def backward_workspace(shape: MicroBatchShape) -> int:
    """Return the peak extra memory of a block's backward pass in bytes, which is reached at the activation function."""
    gradients = ACTIVATIONS[shape.section.activation].backward_tensors
    return shape.hidden + gradients * shape.tokens * (shape.section.d_ff // shape.tensor_parallel) * shape.element


def final_norm(shape: MicroBatchShape) -> int:
    """Return the bytes that the final norm saves: its input and statistics. The head does not save its own input."""
    return shape.hidden + _norm_statistics(shape)


def loss_gradients(shape: MicroBatchShape) -> int:
    """Return the bytes of the gradients that the loss computes in its forward pass (model/loss.py).

    These are the gradients of the hidden states and, in fp32, of the vocabulary matrix.
    """
    return shape.hidden + FP32_BYTES * shape.vocab_rows * shape.section.d_model


def loss_workspace(shape: MicroBatchShape, on_cpu: bool) -> int:
    """Return the peak extra memory of the loss in bytes, which is reached in the forward or in the backward pass.

    The forward pass holds the hidden states, the logits of a chunk, the probabilities of the chunk in fp32 with their
    gradient, and the chunk's contribution to the gradient of the vocabulary matrix. The backward pass holds the scaled
    gradient of the matrix, and its copy in the dtype of the weights.

    Args:
        shape: the shape of the micro-batch.
        on_cpu: whether to use the smaller chunks of CPUs.
    """
    chunks = -(-shape.tokens // flops.chunk_tokens(shape.vocab_rows, on_cpu))
    tokens = -(-shape.tokens // chunks)
    logits = tokens * shape.vocab_rows
    matrix = shape.vocab_rows * shape.section.d_model
    cast = shape.element if shape.element < FP32_BYTES else 0
    product = 0
    if chunks > 1 or cast:
        product = matrix * (shape.element + (FP32_BYTES if cast and chunks > 1 else 0))
    # If the vocabulary is split, the logits of each shard are shifted before the softmax, which needs another copy.
    softmax = logits * (shape.element + FP32_BYTES * (2 if shape.tensor_parallel > 1 else 1))
    gradient = logits * (shape.element + FP32_BYTES + cast) + product
    rows = shape.hidden + tokens * shape.section.d_model * shape.element
    return max(rows + max(softmax, gradient), matrix * (FP32_BYTES + cast))


def _norm_statistics(shape: MicroBatchShape) -> int:
    """Return the bytes of a norm's statistics: one fp32 number per token for rmsnorm, and two for layernorm."""
    return shape.tokens * FP32_BYTES * (2 if shape.section.norm == "layernorm" else 1)


def _attention(shape: MicroBatchShape) -> int:
    section = shape.section
    head = section.d_model // section.n_head
    queries = section.d_model // shape.tensor_parallel
    keys = section.n_kv_head * head // shape.tensor_parallel
    saved = queries + 2 * keys  # Attention saves q, k and v.
    if (section.position == "rope" or section.qk_norm) and shape.sequence_parallel == 1:
        saved += queries + keys  # Here q and k are copies, while v is a view of the fused projection.
    # The output of attention is saved, with sequence parallelism both before and after the all-to-all.
    saved += queries * (2 if shape.sequence_parallel > 1 else 1)
    if section.qk_norm and shape.sequence_parallel > 1:
        saved += queries + keys  # The norm saves its output, and the all-to-all copies it.
    heads = section.n_head // shape.tensor_parallel
    log_sums = heads * FP32_BYTES  # The fused kernel saves the logarithm of each query's softmax denominator.
    norms = (section.n_head + section.n_kv_head) // shape.tensor_parallel * FP32_BYTES if section.qk_norm else 0
    return shape.tokens * (saved * shape.element + log_sums + norms)


def _mlp(shape: MicroBatchShape) -> int:
    saved = ACTIVATIONS[shape.section.activation].saved_tensors
    return saved * shape.tokens * (shape.section.d_ff // shape.tensor_parallel) * shape.element
