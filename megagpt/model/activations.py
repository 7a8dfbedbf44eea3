"""Table of the MLP's activation functions.

To add an activation function, add it to this table and to `activation` in config/recipe/sections.py. torch is imported
only when an activation function is called, so that the planner can read the table without importing torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """One activation function, with properties that the planner and the export need.

    Attributes:
        function: maps the outputs [..., d_ff] of `up` and of `gate` to [..., d_ff]. The output of `gate` is None if the
            activation is not gated
        saved_tensors: number of tensors with d_ff values per token that autograd saves in the MLP
        backward_tensors: number of gradients with d_ff values per token that exist at once in the backward pass
        gpt2: value of `activation_function` in transformers' GPT-2, or None if GPT-2 does not support the activation
        llama: value of `hidden_act` in transformers' Llama, whose MLP is always gated, or None if Llama does not
            support the activation
        llama_gate_is_up: True if the export has to use the matrix `up` also as the gate of Llama's MLP

    """

    function: Callable[[Tensor, Tensor | None], Tensor]
    saved_tensors: int
    backward_tensors: int
    gpt2: str | None = None
    llama: str | None = None
    llama_gate_is_up: bool = False


def _gelu(up: Tensor, gate: Tensor | None) -> Tensor:
    """Compute the tanh approximation of GELU, as in GPT-2."""
    from torch.nn.functional import gelu

    return gelu(up, approximate="tanh")


def _swiglu(up: Tensor, gate: Tensor | None) -> Tensor:
    """Compute silu(gate) · up (SwiGLU, arXiv 2002.05202)."""
    from torch.nn.functional import silu

    assert gate is not None  # a layer with a gated activation has a gate
    return silu(gate) * up


def _relu2(up: Tensor, gate: Tensor | None) -> Tensor:
    """Compute max(up, 0)² (Primer, arXiv 2109.08668)."""
    from megagpt.model.fused_ops import relu_squared

    return relu_squared(up)


ACTIVATIONS = {
    # Autograd saves the input and the output.
    "gelu": Activation(_gelu, saved_tensors=2, backward_tensors=1, gpt2="gelu_new"),
    # Autograd saves the gate, the SiLU of the gate, `up`, and the product of the last two.
    "swiglu": Activation(_swiglu, saved_tensors=4, backward_tensors=2, llama="silu"),
    # Autograd saves the positive part of the input and its square. Because relu(x)² = relu(x) · x, Llama can compute it
    # as a gated ReLU whose two matrices are equal.
    "relu2": Activation(
        _relu2, saved_tensors=2, backward_tensors=1, gpt2="relu2", llama="relu", llama_gate_is_up=True
    ),
}  # fmt: skip
