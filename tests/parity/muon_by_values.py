"""Independent implementation of Muon: applies the iteration's polynomial to the singular values."""

from __future__ import annotations

import torch

from megagpt.config.recipe.sections import OptimizerSection

BLOCK_MATRICES = ("qkv.weight", "output.weight", "up.weight", "down.weight", "gate.weight")
_A, _B, _C = 3.4445, -4.7750, 2.0315  # Keller Jordan et al. 2024
_TINY = 1e-7  # also theirs: a zero matrix stays zero


class MuonByValues:
    """Optimizer that updates some matrices by Muon, and all other parameters by AdamW.

    Args:
        adamw: optimizer of the other parameters.
        matrices: parameters to update by Muon, by name.
        parts: number of matrices of equal height in a fused qkv.
        section: optimizer section of the recipe.
    """

    def __init__(
        self, adamw: torch.optim.Optimizer, matrices: dict[str, torch.Tensor], parts: int, section: OptimizerSection
    ) -> None:
        self._adamw, self._parts, self._section = adamw, parts, section
        self._momentum = {name: torch.zeros_like(matrix) for name, matrix in matrices.items()}
        self._matrices = matrices
        self._group: dict[str, float] = {"lr": 0.0}
        self.param_groups = [*adamw.param_groups, self._group]

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters."""
        self._adamw.step()
        beta, rate = self._section.muon_momentum, self._group["lr"]
        for name, matrix in self._matrices.items():
            momentum = self._momentum[name]
            momentum.mul_(beta).add_(matrix.grad, alpha=1 - beta)
            ahead = beta * momentum + (1 - beta) * matrix.grad  # Nesterov's
            cut = ahead.chunk(self._parts) if name.endswith("qkv.weight") else [ahead]
            matrix.mul_(1 - rate * self._section.weight_decay)
            matrix.sub_(rate * torch.cat([_orthogonal(part) for part in cut]))


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return U·p(p(p(p(p(S)))))·Vᵀ of the normalized matrix, computed in fp64.

    If the matrix has more rows than columns, the result is scaled by the root of their ratio.
    """
    left, values, right = torch.linalg.svd(matrix.double() / (matrix.double().norm() + _TINY), full_matrices=False)
    for _ in range(5):
        values = _A * values + _B * values**3 + _C * values**5
    tall = max(1.0, matrix.size(0) / matrix.size(1)) ** 0.5
    return (tall * (left * values) @ right).float()
