"""Plain numbers that the training loop passes around: frozen, no torch."""

from __future__ import annotations

from dataclasses import dataclass

IGNORE_INDEX = -100
"""Label that takes no part in the loss. The value is PyTorch's default `ignore_index`."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after `update` updates.

    `position` is the data position: samples consumed or left out. `tokens` counts the valid target tokens trained on.
    """

    update: int = 0
    position: int = 0
    tokens: int = 0

    def advanced(self, samples: int, tokens: int) -> TrainState:
        """The state after one more update that used up `samples` data positions, with `tokens` valid target tokens."""
        return TrainState(self.update + 1, self.position + samples, self.tokens + tokens)


@dataclass(frozen=True)
class LossScale:
    """fp16's dynamic loss scale, and the smallest that it may become."""

    value: float
    minimum: float


@dataclass(frozen=True)
class UpdateResult:
    """What one update did, the same numbers on every rank.

    `loss` in nats per token over the global batch before the update, `grad_norm` of the whole model before
    clipping, `lr` the rate that this update used, `tokens` the valid target tokens of the global batch.
    `made` is False where the loss was not accepted or the gradient was not finite: nothing has changed then.
    `scale` is the loss scale that the gradient was made at; None where there is no dynamic one.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    made: bool = True
    scale: LossScale | None = None
