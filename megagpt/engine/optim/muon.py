"""The Muon optimizer, which updates a matrix by its momentum, orthogonalized with a Newton–Schulz iteration.

Source: Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon). torch and DeepSpeed run the iteration in bf16. On
a CPU without bf16 units that is many times slower, and the rounding changes the loss curve. This implementation runs it
in the precision of the gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megagpt.engine.optim.muon_all_to_all import MuonAllToAll, split_into_batches

# Coefficients of the quintic polynomial in the reference implementation. They maximize its slope at 0, so that five
# steps are enough.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximate the nearest semi-orthogonal matrices. The singular values of the result are between 0.7 and 1.2.

    Args:
        matrices: Matrices [number, rows, columns].
        steps: Number of Newton–Schulz iterations.

    Returns:
        The orthogonalized matrices [number, rows, columns].
    """
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    wide = 2 * x.size(2) >= 3 * x.size(1) and x.dtype == torch.float32
    x = _iterate_on_gram(x, steps) if wide else _iterate(x, steps)
    return x.mT if tall else x


def _iterate(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Repeat X ← a·X + (b·G + c·G²)·X with G = X·Xᵀ for `steps` times, and return X."""
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x


def _iterate_on_gram(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the same as `_iterate`, with fewer operations if the matrices are much wider than tall.

    Each step only computes the small matrices Q = a·I + b·G + c·G² and G ← Q·G·Q. At the end, X is multiplied by the
    product of all Q. This requires fp32, because G is never recomputed from X and accumulates rounding errors.
    """
    gram = x @ x.mT
    product = torch.eye(gram.size(1), dtype=gram.dtype, device=gram.device).expand_as(gram)
    for _ in range(steps):
        q = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        q.diagonal(dim1=1, dim2=2).add_(_A)
        product = q @ product
        gram = q @ (gram @ q)
    return product @ x


class Muon(torch.optim.Optimizer):
    """Optimizer with torch's interface that uses Muon for matrices and AdamW for all other parameters.

    A parameter group with `muon: True` holds matrices. Its key `parts` is the number of equal slices of rows that are
    orthogonalized separately (3 for a fused q, k, v of equal widths). torch's AdamW updates every other group.

    Attributes:
        all_to_all_plans: Maps each ZeRO flat buffer to the plan that reassembles its matrices. Parameters that are not
            listed are whole matrices.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, **adamw: Any) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "muon": False, "momentum": momentum})
        adamw_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw = torch.optim.AdamW(adamw_groups, **adamw)
        # Both optimizers share the dictionaries of the groups, so a learning rate schedule affects both.
        for group in adamw_groups:
            for key, value in self._adamw.defaults.items():
                group.setdefault(key, value)
        self.all_to_all_plans: dict[torch.Tensor, MuonAllToAll] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. The gradients of matrices are overwritten."""
        # The groups and the state are assigned before each step, because ZeRO steps one group at a time and
        # load_state_dict replaces all groups.
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state
        self._adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Update the matrices of a group. Matrices of equal shape are stacked, because large products are faster."""
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        compute_updates = partial(updates, parts=group["parts"])
        whole: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for parameter in parameters:
            direction = self._direction(parameter, group["momentum"])
            if parameter in self.all_to_all_plans:
                self.all_to_all_plans[parameter].replace_by_updates(direction, compute_updates)
            else:
                whole[parameter.shape].append(direction)
        for shape, directions in whole.items():
            for batch in split_into_batches(directions, shape.numel()):
                for direction, update in zip(batch, compute_updates(torch.stack(batch)), strict=True):
                    direction.copy_(update)
        for parameter in parameters:
            assert parameter.grad is not None  # `parameters` contains no parameter without a gradient
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(parameter.grad, alpha=-group["lr"])

    def _direction(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        """Apply Nesterov momentum to the gradient in place. Returns the gradient."""
        state = self.state[parameter]
        gradient = parameter.grad
        assert gradient is not None  # the caller passes only parameters with a gradient
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return gradient.lerp_(state["momentum_buffer"].lerp_(gradient, 1 - momentum), momentum)


def updates(directions: torch.Tensor, parts: int) -> torch.Tensor:
    """Return the updates of matrices, which Muon multiplies by the learning rate and subtracts from the weights.

    Args:
        directions: Gradients after applying momentum [number, rows, columns].
        parts: Number of equal slices of rows that are orthogonalized separately.

    Returns:
        The updates [number, rows, columns].
    """
    rows, columns = directions.shape[1:]
    separate = directions.reshape(-1, rows // parts, columns)
    scale = max(1.0, separate.size(1) / columns) ** 0.5  # as in the reference implementation
    return orthogonalize(separate).mul_(scale).view(-1, rows, columns)
