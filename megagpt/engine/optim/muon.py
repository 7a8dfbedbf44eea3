"""Muon for the matrices of the blocks: momentum, orthogonalized by a Newton–Schulz iteration.

Source: Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon). The iteration of torch's and DeepSpeed's Muon is
in bf16. A CPU without bf16 units runs that many times slower, and its rounding changes the loss curve; this one keeps
the precision of the gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megagpt.engine.optim.muon_all_to_all import MuonAllToAll, split_into_batches

# quintic coefficients of the reference: they maximize the slope at 0, so that five steps suffice
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximate the nearest semi-orthogonal matrices: singular values end between 0.7 and 1.2.

    Args:
        matrices: Matrices [number, rows, columns]. The iteration runs on their shorter side.
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
    """Compute X ← a·X + (b·G + c·G²)·X with G = X·Xᵀ, step by step."""
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x


def _iterate_on_gram(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Compute the same for wide matrices with products of the short side only.

    Each step is G ← Q·G·Q, and X is multiplied by the product of all Q at the end. This needs fp32, because rounding
    errors in G are never corrected from X.
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
    """Muon for 2-D weights and AdamW for all others, in one optimizer with torch's interface.

    A group with `muon: True` holds matrices. Its key `parts` is the number of equal blocks of rows into which each
    matrix is split first (3 for a fused q, k, v of equal widths). Every other group is passed to torch's fused AdamW.

    Attributes:
        all_to_all_plans: Maps each ZeRO flat buffer to the plan that reassembles its matrices. Parameters that are not
            listed are whole matrices.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, **adamw: Any) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "muon": False, "momentum": momentum})
        adamw_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw = torch.optim.AdamW(adamw_groups, **adamw)
        for group in adamw_groups:  # the same dictionaries, so that a schedule on this optimizer reaches both
            for key, value in self._adamw.defaults.items():
                group.setdefault(key, value)
        self.all_to_all_plans: dict[torch.Tensor, MuonAllToAll] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. The gradients of matrices are overwritten."""
        # not kept from earlier steps: ZeRO steps one group at a time, and load_state_dict replaces all groups
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state
        self._adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Update matrices, those of equal shape together: a few large products instead of many small ones."""
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
            assert parameter.grad is not None  # selected above
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(parameter.grad, alpha=-group["lr"])

    def _direction(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        """Apply Nesterov momentum to the gradient, in place."""
        state = self.state[parameter]
        gradient = parameter.grad
        assert gradient is not None  # checked by the caller
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return gradient.lerp_(state["momentum_buffer"].lerp_(gradient, 1 - momentum), momentum)


def updates(directions: torch.Tensor, parts: int) -> torch.Tensor:
    """Return what Muon subtracts from matrices at a learning rate of 1.

    Args:
        directions: Gradients with momentum [number, rows, columns].
        parts: Number of matrices, one below the other, that each of them consists of.
    """
    rows, columns = directions.shape[1:]
    separate = directions.reshape(-1, rows // parts, columns)
    scale = max(1.0, separate.size(1) / columns) ** 0.5  # the reference's factor for tall matrices
    return orthogonalize(separate).mul_(scale).view(-1, rows, columns)
