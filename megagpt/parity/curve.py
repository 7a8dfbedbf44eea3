"""Comparison of two runs, update by update, and the tolerances of all parity checks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megagpt.config.recipe import Recipe


@dataclass(frozen=True)
class Curve:
    """All numbers of a run that are compared.

    Attributes:
        losses: loss of each update, in nats per token.
        norms: gradient norm of each update, before clipping.
        rates: learning rate of each update.
        tokens: number of valid tokens of each update.
        held_out: two losses on held-out samples, before and after training.
        initial: fp32 weights before training, by parameter name.
        weights: fp32 weights after training, by parameter name.
    """

    losses: list[float]
    norms: list[float]
    rates: list[float]
    tokens: list[int]
    held_out: list[float]
    initial: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed relative differences.

    Attributes:
        loss: largest allowed relative difference of a loss.
        norm: largest allowed relative difference of a gradient norm.
        weights: largest allowed difference of a tensor's final value, relative to the distance from its initial value.
    """

    loss: float
    norm: float
    weights: float


# fp32: Sums in a different order differ by a few units of 2^-24 = 6e-8. Over 100 updates, the measured differences of
# losses and norms were below 2e-6, and five times that is allowed. The weights differ by more. Adam divides by the root
# mean square of the gradient, so rounding errors move weights whose gradients are tiny. The loss hardly depends on
# these weights.
# bf16 and fp16: The relative rounding error is up to 2^-9 = 2e-3 or 2^-12 = 2e-4, and it depends on how the batch is
# split. A loss averages over hundreds of tokens, while a norm depends on a few large values. Weights accumulate the
# rounding errors of all updates (see `calibrated_tolerance`).
# muon in fp32: Each step of Muon's iteration multiplies the small singular values of a gradient by 3.4, and their
# rounding errors, too. The loss hardly depends on these directions. In low precision, other rounding errors are larger.
TOLERANCES = {
    "fp32": Tolerance(1e-5, 1e-5, 1e-4),
    "muon": Tolerance(1e-5, 1e-5, 5e-4),
    "bf16": Tolerance(1e-3, 2e-2, 1e-1),
    "fp16": Tolerance(2e-4, 4e-3, 2e-2),
}
KINDS = ("loss", "norm", "held-out", "weights")


@dataclass(frozen=True)
class Difference:
    """Comparison of one number of a curve with that of the reference.

    Attributes:
        kind: kind of the number, such as one of `KINDS`.
        what: name of the number, with its update or parameter.
        got: value of the layout. For a tensor, this is its norm.
        expected: value of the reference. For a tensor, this is its norm.
        off: relative difference.
        limit: largest allowed value of `off`.
    """

    kind: str
    what: str
    got: float
    expected: float
    off: float
    limit: float

    @property
    def too_far(self) -> bool:
        """True if the difference is NaN or larger than allowed."""
        return not self.off <= self.limit

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.got:.9g} instead of {self.expected:.9g}, relative difference {self.off:.2g}, "
            f"allowed {self.limit:.2g}"
        )


def tolerance_of(recipe: Recipe) -> Tolerance:
    """Return the tolerance for a recipe's precision and optimizer."""
    exact = recipe.precision in (None, "fp32")
    return TOLERANCES["muon" if exact and recipe.optimizer.type == "muon" else recipe.precision or "fp32"]


def calibrated_tolerance(recipe: Recipe, expected: Curve, exact: Curve) -> Tolerance:
    """Return `tolerance_of(recipe)`, but in low precision with a tolerance for weights that is measured on this run.

    Adam's first steps depend on little more than the sign of the gradient, so rounding decides how far a weight moves
    if its gradient is close to zero. In addition, torch on a CPU sums the gradient of a norm's weight over the tokens
    in low precision. After 8 updates, fp16 weights therefore differ from exact ones by 1e-2 to 4e-2 of the distance
    that they have moved, and after 20 updates by a third of that. The weights of a layout, which rounds differently,
    differ by as much in another direction. The allowed difference of each tensor is twice the root of the sum of
    squares, over all tensors, of the differences between the reference and the exact run. Differences of up to 1.3
    times that root were measured.

    Args:
        recipe: The recipe of the runs.
        expected: The curve of the reference.
        exact: The curve of the reference when computed in fp32.

    Returns:
        The tolerance.
    """
    tolerance = tolerance_of(recipe)
    if recipe.precision in (None, "fp32"):
        return tolerance
    return replace(tolerance, weights=2 * math.hypot(*(off for _, off in _weight_distances(recipe, exact, expected))))


def compare(recipe: Recipe, expected: Curve, got: Curve, tolerance: Tolerance | None = None) -> list[Difference]:
    """Compare every number of a run with the reference.

    Args:
        recipe: The recipe of both runs.
        expected: The curve of the reference.
        got: The curve of the layout.
        tolerance: The allowed differences. The default is `tolerance_of(recipe)`.

    Returns:
        All comparisons: first the numbers that must be equal, then those of each update, then the weights.
    """
    tolerance = tolerance or tolerance_of(recipe)
    return [
        *_compare_exact(expected, got),
        *_compare_updates(expected, got, tolerance),
        *_compare_weights(recipe, expected, got, tolerance),
    ]


def compare_update(
    recipe: Recipe, got: tuple[float, float], expected: tuple[float, float]
) -> tuple[Difference, Difference]:
    """Compare the loss and the gradient norm of a single update.

    Args:
        recipe: The recipe, which determines the tolerance.
        got: Loss and gradient norm of the layout.
        expected: Loss and gradient norm of one process.

    Returns:
        The comparison of the losses, and that of the gradient norms.
    """
    tolerance = tolerance_of(recipe)
    return (
        _relative("loss", "loss of the update", got[0], expected[0], tolerance.loss),
        _relative("norm", "gradient norm of the update", got[1], expected[1], tolerance.norm),
    )


def worst(differences: Sequence[Difference], kind: str) -> Difference:
    """Return the comparison of one kind (loss, norm, held-out or weights) with the largest relative difference."""
    return max((row for row in differences if row.kind == kind), key=lambda row: (row.too_far, row.off))


def _compare_exact(expected: Curve, got: Curve) -> Iterator[Difference]:
    yield _relative("length", "number of updates", len(got.losses), len(expected.losses), 0.0)
    for number, pair in enumerate(zip(got.tokens, expected.tokens, strict=True), start=1):
        yield _relative("tokens", f"valid tokens of update {number}", *pair, 0.0)
    for number, rates in enumerate(zip(got.rates, expected.rates, strict=True), start=1):
        yield _relative("rate", f"learning rate of update {number}", *rates, 1e-12)
    for name, start in expected.initial.items():
        off = 0.0 if torch.equal(got.initial[name], start) else float("inf")
        values = (got.initial[name].norm().item(), start.norm().item())
        yield Difference("initial", f"initial value of {name}", *values, off, 0.0)


def _compare_updates(expected: Curve, got: Curve, tolerance: Tolerance) -> Iterator[Difference]:
    pairs = zip(got.losses, expected.losses, got.norms, expected.norms, strict=True)
    for number, (loss, right_loss, norm, right_norm) in enumerate(pairs, start=1):
        yield _relative("loss", f"loss of update {number}", loss, right_loss, tolerance.loss)
        yield _relative("norm", f"gradient norm of update {number}", norm, right_norm, tolerance.norm)
    for when, pair in zip(("before", "after"), zip(got.held_out, expected.held_out, strict=True), strict=True):
        yield _relative("held-out", f"loss on held-out samples {when} training", *pair, tolerance.loss)


def _compare_weights(recipe: Recipe, expected: Curve, got: Curve, tolerance: Tolerance) -> Iterator[Difference]:
    for name, off in _weight_distances(recipe, expected, got):
        values = (got.weights[name].norm().item(), expected.weights[name].norm().item())
        yield Difference("weights", f"final value of {name}", *values, off, tolerance.weights)


def _weight_distances(recipe: Recipe, expected: Curve, got: Curve) -> Iterator[tuple[str, float]]:
    """Yield the name of each parameter, and its distance from the expected value.

    The distance is relative to that between the initial and the final expected value.
    """
    for name, right in expected.weights.items():
        moved = without_key_bias(recipe, name, right - expected.initial[name]).norm().item()
        yield name, without_key_bias(recipe, name, got.weights[name] - right).norm().item() / moved


def _relative(kind: str, what: str, got: float, expected: float, limit: float) -> Difference:
    return Difference(kind, what, got, expected, abs(got - expected) / abs(expected), limit)


def without_key_bias(recipe: Recipe, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter without the bias of the keys. Softmax cancels that bias, so its gradient is only rounding.

    Args:
        recipe: The recipe.
        name: The name of the parameter.
        tensor: The value of the parameter, or a difference of two values.
    """
    if not name.endswith(".qkv.bias"):
        return tensor
    width = recipe.model.d_model // recipe.model.n_head
    return torch.cat((tensor[: recipe.model.d_model], tensor[-recipe.model.n_kv_head * width :]))
