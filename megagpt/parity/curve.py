"""What a run did, as far as parity compares it; the tolerances, once; and the comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megagpt.config.recipe import Recipe


@dataclass(frozen=True)
class Curve:
    """Per update: loss, gradient norm before clipping, learning rate, valid tokens. Before and after training: the
    loss on held-out samples, and all weights in fp32 by name.
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
    """Largest relative difference of a loss, of a gradient norm, and of one tensor's whole way from its start."""

    loss: float
    norm: float
    weights: float


# fp32: sums in another order differ by a few units of 2^-24 = 6e-8, here less than 2e-6 of a loss or a norm over
# 100 updates; five times that is allowed. Adam divides by the root of the gradient's square: weights with tiny
# gradients turn rounding into moves, which the curve hardly sees.
# bf16 and fp16: each value is rounded to 2^-9 = 2e-3 or 2^-12 = 2e-4, in another place when the batch is cut otherwise;
# a loss averages over hundreds of tokens, a norm is led by few large values, weights sum up all updates: see `allowed`.
# muon in fp32: a step of its iteration multiplies the small singular values of a gradient, and with them their
# rounding, by 3.4; the curve hardly sees these directions either. In low precision that of all else is larger.
TOLERANCES = {
    "fp32": Tolerance(1e-5, 1e-5, 1e-4),
    "muon": Tolerance(1e-5, 1e-5, 5e-4),
    "bf16": Tolerance(1e-3, 2e-2, 1e-1),
    "fp16": Tolerance(2e-4, 4e-3, 2e-2),
}
KINDS = ("loss", "norm", "held-out", "weights")


@dataclass(frozen=True)
class Difference:
    """One number of a curve beside the reference's: `off` is relative, `limit` the largest allowed."""

    kind: str
    what: str
    got: float
    expected: float
    off: float
    limit: float

    @property
    def too_far(self) -> bool:
        """Whether parity is broken; a NaN breaks it."""
        return not self.off <= self.limit

    def __str__(self) -> str:
        return f"{self.what}: {self.got:.9g} for {self.expected:.9g}, off by {self.off:.2g}, allowed {self.limit:.2g}"


def tolerance_of(recipe: Recipe) -> Tolerance:
    """What a recipe's curve and weights may differ by."""
    exact = recipe.precision in (None, "fp32")
    return TOLERANCES["muon" if exact and recipe.optimizer.type == "muon" else recipe.precision or "fp32"]


def allowed(recipe: Recipe, expected: Curve, exact: Curve) -> Tolerance:
    """The same, with what low precision moves weights by in this very run: `exact` is `expected` computed in fp32.

    Adam's first steps have the gradient's sign and little more, so that rounding decides how far a weight with a
    gradient near zero goes; and on a CPU torch adds up a norm's gradient over the tokens in low precision. fp16 is thus
    off by 1e-2 to 4e-2 of the way after 8 updates, by a third of that after 20. A layout, which rounds in other places,
    is as far off in another direction: a tensor may be apart by twice what all of the reference's are together (the
    root of their squares' sum). Measured: up to 1.3 times.
    """
    tolerance = tolerance_of(recipe)
    if recipe.precision in (None, "fp32"):
        return tolerance
    return replace(tolerance, weights=2 * math.hypot(*(off for _, off in _apart(recipe, exact, expected))))


def compare(recipe: Recipe, expected: Curve, got: Curve, tolerance: Tolerance | None = None) -> list[Difference]:
    """Every number of `got` beside the reference's: first what should be equal, then update by update, then weights."""
    tolerance = tolerance or tolerance_of(recipe)
    return [*_exact(expected, got), *_updates(expected, got, tolerance), *_weights(recipe, expected, got, tolerance)]


def of_update(recipe: Recipe, got: tuple[float, float], expected: tuple[float, float]) -> tuple[Difference, Difference]:
    """Compare the loss and the gradient norm of a single update.

    Args:
        recipe: The recipe, whose precision decides what is allowed.
        got: Loss and gradient norm of the layout.
        expected: Those of one process.
    """
    tolerance = tolerance_of(recipe)
    return (
        _row("loss", "loss of the update", got[0], expected[0], tolerance.loss),
        _row("norm", "gradient norm of the update", got[1], expected[1], tolerance.norm),
    )


def worst(differences: Sequence[Difference], kind: str) -> Difference:
    """The largest relative difference of a kind: loss, norm, held-out, weights."""
    return max((row for row in differences if row.kind == kind), key=lambda row: (row.too_far, row.off))


def _exact(expected: Curve, got: Curve) -> Iterator[Difference]:
    yield _row("length", "number of updates", len(got.losses), len(expected.losses), 0.0)
    for number, pair in enumerate(zip(got.tokens, expected.tokens, strict=True), start=1):
        yield _row("tokens", f"valid tokens of update {number}", *pair, 0.0)
    for number, rates in enumerate(zip(got.rates, expected.rates, strict=True), start=1):
        yield _row("rate", f"learning rate of update {number}", *rates, 1e-12)
    for name, start in expected.initial.items():
        off = 0.0 if torch.equal(got.initial[name], start) else float("inf")
        values = (got.initial[name].norm().item(), start.norm().item())
        yield Difference("initial", f"initial value of {name}", *values, off, 0.0)


def _updates(expected: Curve, got: Curve, tolerance: Tolerance) -> Iterator[Difference]:
    pairs = zip(got.losses, expected.losses, got.norms, expected.norms, strict=True)
    for number, (loss, right_loss, norm, right_norm) in enumerate(pairs, start=1):
        yield _row("loss", f"loss of update {number}", loss, right_loss, tolerance.loss)
        yield _row("norm", f"gradient norm of update {number}", norm, right_norm, tolerance.norm)
    for when, pair in zip(("before", "after"), zip(got.held_out, expected.held_out, strict=True), strict=True):
        yield _row("held-out", f"loss on held-out samples {when} training", *pair, tolerance.loss)


def _weights(recipe: Recipe, expected: Curve, got: Curve, tolerance: Tolerance) -> Iterator[Difference]:
    for name, off in _apart(recipe, expected, got):
        values = (got.weights[name].norm().item(), expected.weights[name].norm().item())
        yield Difference("weights", f"final value of {name}", *values, off, tolerance.weights)


def _apart(recipe: Recipe, expected: Curve, got: Curve) -> Iterator[tuple[str, float]]:
    """Each tensor, and how far it ended from the expected one, relative to that one's whole way."""
    for name, right in expected.weights.items():
        way = seen(recipe, name, right - expected.initial[name]).norm().item()
        yield name, seen(recipe, name, got.weights[name] - right).norm().item() / way


def _row(kind: str, what: str, got: float, expected: float, limit: float) -> Difference:
    return Difference(kind, what, got, expected, abs(got - expected) / abs(expected), limit)


def seen(recipe: Recipe, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Without the bias of the keys: softmax does not see it, so that its gradient is rounding alone."""
    if not name.endswith(".qkv.bias"):
        return tensor
    width = recipe.model.d_model // recipe.model.n_head
    return torch.cat((tensor[: recipe.model.d_model], tensor[-recipe.model.n_kv_head * width :]))
