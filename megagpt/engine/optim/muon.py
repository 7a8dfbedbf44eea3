"""Muon: momentum, orthogonalised by a Newton–Schulz iteration, for the matrices of the blocks.

Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon). torch's and DeepSpeed's Muon iterate in bf16, which a CPU
without bf16 units runs many times slower, and a GPU rounds to another curve; this one keeps the gradient's precision.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megagpt.engine.optim.muon_all_to_all import Exchange, batches

# quintic coefficients of the reference: steepest at 0, five steps suffice
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values end between 0.7 and 1.2.

    `matrices` and the result: [number, rows, columns]. Iterates on the short side.
    """
    tall = matrices.size(1) > matrices.size(2)
    work = matrices.mT if tall else matrices
    work = work / (work.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    wide = 2 * work.size(2) >= 3 * work.size(1) and work.dtype == torch.float32
    work = _through_gram(work, steps) if wide else _direct(work, steps)
    return work.mT if tall else work


def _direct(work: torch.Tensor, steps: int) -> torch.Tensor:
    """X ← a·X + (b·G + c·G²)·X with G = X·Xᵀ, step by step."""
    for _ in range(steps):
        gram = work @ work.mT
        work = torch.baddbmm(work, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), work, beta=_A)
    return work


def _through_gram(work: torch.Tensor, steps: int) -> torch.Tensor:
    """The same for wide matrices with products of the short side only: G ← Q·G·Q, and all Q together at the end.

    Needs fp32: rounding in G is not corrected by looking at X again.
    """
    gram = work @ work.mT
    total = torch.eye(gram.size(1), dtype=gram.dtype, device=gram.device).expand_as(gram)
    for _ in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        factor.diagonal(dim1=1, dim2=2).add_(_A)
        total, gram = factor @ total, factor @ (gram @ factor)
    return total @ work


class Muon(torch.optim.Optimizer):
    """Muon for 2-D weights, AdamW for the rest, in one optimizer with torch's interface.

    A group with `muon: True` holds matrices; its key `parts` says into how many equal blocks of rows each is
    cut first (3 for a fused q, k, v of equal widths). Every other group is given to torch's fused AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, **adamw: Any) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "muon": False, "momentum": momentum})
        rest = [group for group in self.param_groups if not group["muon"]]
        self._adamw = torch.optim.AdamW(rest, **adamw)
        for group in rest:  # the same dictionaries, so that a schedule on this optimizer reaches both
            for key, value in self._adamw.defaults.items():
                group.setdefault(key, value)
        self.exchanges: dict[torch.Tensor, Exchange] = {}
        """by a flat tensor of ZeRO's how the matrices in it are made whole; other parameters are matrices themselves"""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; the gradients of matrices are used up."""
        # looked up each time: ZeRO steps one group after the other, and load_state_dict makes all anew
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state
        self._adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Equal shapes go through the iteration together: a few large products instead of many small ones."""
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        solve = partial(updates, parts=group["parts"])
        whole: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for parameter in parameters:
            direction = self._direction(parameter, group["momentum"])
            if parameter in self.exchanges:
                self.exchanges[parameter].put_updates(direction, solve)
            else:
                whole[parameter.shape].append(direction)
        for shape, directions in whole.items():
            for batch in batches(directions, shape.numel()):
                for direction, update in zip(batch, solve(torch.stack(batch)), strict=True):
                    direction.copy_(update)
        for parameter in parameters:
            assert parameter.grad is not None  # as above
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(parameter.grad, alpha=-group["lr"])

    def _direction(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        """The gradient with Nesterov momentum, in the place of the gradient."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None  # the caller has looked
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return gradient.lerp_(state["momentum_buffer"].lerp_(gradient, 1 - momentum), momentum)


def updates(directions: torch.Tensor, parts: int) -> torch.Tensor:
    """What Muon takes from matrices [number, rows, columns], at rate 1; each is `parts` matrices one below another."""
    rows, columns = directions.shape[1:]
    split = directions.reshape(-1, rows // parts, columns)
    scale = max(1.0, split.size(1) / columns) ** 0.5  # the reference's factor for tall matrices
    return orthogonalise(split).mul_(scale).view(-1, rows, columns)
