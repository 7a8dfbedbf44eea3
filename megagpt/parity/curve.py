"""Comparison of two runs update by update, and the tolerances of every parity check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megagpt.config.recipe import Recipe


@dataclass(frozen=True)
class Curve:
    """Record of a run.

    Attributes:
        losses: loss of each update, in nats per token.
        norms: gradient norm of each update, before clipping.
        rates: learning rate of each update.
        tokens: number of valid tokens of each update.
        held_out: loss on held-out samples before and after training.
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
        loss: of a loss.
        norm: of a gradient norm.
        weights: of a tensor's final value, relative to the distance from its initial value.
    """

    loss: float
    norm: float
    weights: float


# fp32: sums in another order differ by a few units of 2^-24 = 6e-8, which was measured as less than 2e-6 of a loss or
# norm over 100 updates. Five times that is allowed. The weights differ by more, because Adam divides by the root mean
# square of the gradient: where gradients are tiny, weights move by rounding errors. The loss hardly depends on them.
# bf16 and fp16: each value is rounded to 2^-9 = 2e-3 or 2^-12 = 2e-4, and differently if the batch is split
# differently. A loss averages over hundreds of tokens, while a norm depends on a few large values. Weights accumulate
# the rounding of all updates, see `calibrated_tolerance`.
# muon in fp32: each step of its iteration multiplies the small singular values of a gradient by 3.4, and their rounding
# errors too. The loss hardly depends on these directions either. In low precision, other rounding errors are larger.
TOLERANCES = {
    "fp32": Tolerance(1e-5, 1e-5, 1e-4),
    "muon": Tolerance(1e-5, 1e-5, 5e-4),
    "bf16": Tolerance(1e-3, 2e-2, 1e-1),
    "fp16": Tolerance(2e-4, 4e-3, 2e-2),
}
KINDS = ("loss", "norm", "held-out", "weights")


@dataclass(frozen=True)
class Difference:
    """A number of a curve compared with that of the reference.

    Attributes:
        kind: what is compared, see `KINDS`.
        what: name of the number, with its update or parameter.
        got: value of the layout; of a tensor, its norm.
        expected: value of the reference; of a tensor, its norm.
        off: relative difference.
        limit: the largest `off` that is allowed.
    """

    kind: str
    what: str
    got: float
    expected: float
    off: float
    limit: float

    @property
    def too_far(self) -> bool:
        """True if the difference is larger than allowed, or NaN."""
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
    """Return `tolerance_of(recipe)`, with the tolerance of weights in low precision measured on this very run.

    Adam's first steps are determined by little more than the sign of the gradient, so that rounding decides how far a
    weight moves if its gradient is close to zero. Also, torch on a CPU sums the gradient of a norm's weight over the
    tokens in low precision. After 8 updates, fp16 weights therefore differ from exact ones by 1e-2 to 4e-2 of the
    distance that they have moved, and after 20 updates by a third of that. A layout, which rounds differently, differs
    as much in another direction. Each tensor may differ by twice the root of the sum of squares of the reference's own
    differences over all tensors. Up to 1.3 times that root was measured.

    Args:
        recipe: The recipe.
        expected: The reference's curve.
        exact: The same, computed in fp32.
    """
    tolerance = tolerance_of(recipe)
    if recipe.precision in (None, "fp32"):
        return tolerance
    return replace(tolerance, weights=2 * math.hypot(*(off for _, off in _weight_distances(recipe, exact, expected))))


def compare(recipe: Recipe, expected: Curve, got: Curve, tolerance: Tolerance | None = None) -> list[Difference]:
    """Compare every number of a run with the reference: first what must be equal, then each update, then the weights.

    Args:
        recipe: The recipe of both runs.
        expected: The reference's curve.
        got: The layout's curve.
        tolerance: What is allowed; by default `tolerance_of(recipe)`.
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
        recipe: The recipe, which decides the tolerance.
        got: Loss and gradient norm of the layout.
        expected: Loss and gradient norm of one process.
    """
    tolerance = tolerance_of(recipe)
    return (
        _relative("loss", "loss of the update", got[0], expected[0], tolerance.loss),
        _relative("norm", "gradient norm of the update", got[1], expected[1], tolerance.norm),
    )


def worst(differences: Sequence[Difference], kind: str) -> Difference:
    """Return the largest relative difference of one kind: loss, norm, held-out or weights."""
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
    """Yield each parameter, and its distance from the expected value relative to how far the latter has moved."""
    for name, right in expected.weights.items():
        moved = without_key_bias(recipe, name, right - expected.initial[name]).norm().item()
        yield name, without_key_bias(recipe, name, got.weights[name] - right).norm().item() / moved


def _relative(kind: str, what: str, got: float, expected: float, limit: float) -> Difference:
    return Difference(kind, what, got, expected, abs(got - expected) / abs(expected), limit)


def without_key_bias(recipe: Recipe, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter without the bias of the keys, which softmax cancels, so that its gradient is only rounding.

    Args:
        recipe: The recipe.
        name: The parameter's name.
        tensor: Its value, or a difference of values.
    """
    if not name.endswith(".qkv.bias"):
        return tensor
    width = recipe.model.d_model // recipe.model.n_head
    return torch.cat((tensor[: recipe.model.d_model], tensor[-recipe.model.n_kv_head * width :]))
