"""The table of activation functions of the MLP: to add one, add it here and to `activation` in the recipe's sections.

torch is imported only when an activation runs, so that the planner can read the table without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """One activation function, and what the planner and the export need to know about it.

    Attributes:
        function: computes [..., d_ff] from the outputs [..., d_ff] of `up` and of `gate`, which is None unless gated
        saved_tensors: tensors of d_ff values per token that autograd saves in the MLP
        backward_tensors: gradients of d_ff values per token that exist at once in the backward pass
        gpt2: `activation_function` of transformers' GPT-2; None if GPT-2 cannot compute it
        llama: `hidden_act` of transformers' Llama, which is always gated; None if Llama cannot compute it
        llama_gate_is_up: True if Llama computes it with the matrix `up` as its gate, too

    """

    function: Callable[[Tensor, Tensor | None], Tensor]
    saved_tensors: int
    backward_tensors: int
    gpt2: str | None = None
    llama: str | None = None
    llama_gate_is_up: bool = False


def _gelu(up: Tensor, gate: Tensor | None) -> Tensor:
    """The tanh form, as in GPT-2."""
    from torch.nn.functional import gelu

    return gelu(up, approximate="tanh")


def _swiglu(up: Tensor, gate: Tensor | None) -> Tensor:
    """silu(gate) · up (arXiv 2002.05202)."""
    from torch.nn.functional import silu

    assert gate is not None  # the layer has a gate if its activation is gated
    return silu(gate) * up


def _relu2(up: Tensor, gate: Tensor | None) -> Tensor:
    """max(up, 0)² (Primer, arXiv 2109.08668)."""
    from megagpt.model.fused_ops import relu_squared

    return relu_squared(up)


ACTIVATIONS = {
    # saved: input and output
    "gelu": Activation(_gelu, saved_tensors=2, backward_tensors=1, gpt2="gelu_new"),
    # saved: gate, its silu, up, and the product of the two
    "swiglu": Activation(_swiglu, saved_tensors=4, backward_tensors=2, llama="silu"),
    # saved: the positive part and its square; relu(x)² = relu(x) · x is a gated relu with equal matrices
    "relu2": Activation(
        _relu2, saved_tensors=2, backward_tensors=1, gpt2="relu2", llama="relu", llama_gate_is_up=True
    ),
}  # fmt: skip
