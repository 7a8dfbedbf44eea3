"""The tolerances of parity, once, and the comparison of a curve with the reference's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from reference import Curve

from megagpt.recipe import Recipe


@dataclass(frozen=True)
class Tolerance:
    """Largest relative difference of a loss, of a gradient norm, and of one tensor's whole way from its start."""

    loss: float
    norm: float
    weights: float


# fp32: sums in another order differ by a few units of 2^-24 = 6e-8, here less than 1e-6 of a loss or a norm over
# 100 updates; ten times that is allowed. Adam divides by the root of the gradient's square: weights with tiny
# gradients turn rounding into moves, which the curve hardly sees.
# bf16: each value is rounded to 2^-9 = 2e-3, in another place when the batch is cut otherwise.
TOLERANCES = {"fp32": Tolerance(1e-5, 1e-5, 1e-4), "bf16": Tolerance(5e-3, 2e-2, 2e-1)}


def differences(recipe: Recipe, expected: Curve, got: Curve, tolerance: Tolerance) -> list[str]:
    """Every value of `got` that is too far from `expected`, first the first update."""
    return [
        f"{name}: {value:.9g} for {right:.9g}, off by {off:.2g}, allowed {limit:.2g}"
        for name, value, right, off, limit in _compared(recipe, expected, got, tolerance)
        if not off <= limit  # a NaN is a difference
    ]


def worst(recipe: Recipe, expected: Curve, got: Curve) -> Tolerance:
    """The largest relative differences of a curve."""
    rows = list(_compared(recipe, expected, got, TOLERANCES["fp32"]))
    kinds = ("loss", "norm", "weights")
    return Tolerance(*(max(row[3] for row in rows if row[0].startswith(kind)) for kind in kinds))


def _compared(
    recipe: Recipe, expected: Curve, got: Curve, tolerance: Tolerance
) -> Iterator[tuple[str, float, float, float, float]]:
    if len(got.losses) != len(expected.losses) or got.weights.keys() != expected.weights.keys():
        yield "loss, number of updates", len(got.losses), len(expected.losses), float("inf"), 0.0
        return
    for update, pairs in enumerate(zip(got.losses, expected.losses, got.norms, expected.norms, strict=True), start=1):
        loss, right_loss, norm, right_norm = pairs
        yield f"loss of update {update}", loss, right_loss, _relative(loss, right_loss), tolerance.loss
        yield f"norm of update {update}", norm, right_norm, _relative(norm, right_norm), tolerance.norm
    for when, value, right in zip(("before", "after"), got.held_out, expected.held_out, strict=True):
        yield f"loss on held-out samples {when} training", value, right, _relative(value, right), tolerance.loss
    for name, right_tensor in expected.weights.items():
        move = _meaningful(recipe, name, right_tensor - expected.initial[name])
        off = _meaningful(recipe, name, got.weights[name] - right_tensor).norm().item() / move.norm().item()
        yield f"weights of {name}", float(got.weights[name].norm()), float(right_tensor.norm()), off, tolerance.weights


def _relative(value: float, right: float) -> float:
    return abs(value - right) / abs(right)


def _meaningful(recipe: Recipe, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Without the bias of the keys: softmax does not see it, so that its gradient is rounding alone."""
    if not name.endswith(".qkv.bias"):
        return tensor
    width = recipe.model.d_model // recipe.model.n_head
    kept: Sequence[torch.Tensor] = (tensor[: recipe.model.d_model], tensor[-recipe.model.n_kv_head * width :])
    return torch.cat(tuple(kept))
