"""Immutable values that the training loop passes between its steps. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

IGNORE_INDEX = -100
"""Label that is excluded from the loss. The value is PyTorch's default for `ignore_index`."""


@dataclass(frozen=True)
class TrainState:
    """Progress of a run."""

    update: int = 0
    """number of completed updates"""
    position: int = 0
    """data position, which is the number of samples consumed or skipped"""
    tokens: int = 0
    """number of valid target tokens trained on"""

    def advanced(self, samples: int, tokens: int) -> TrainState:
        """Return the state after one more update.

        Args:
            samples: number of samples that the update consumed.
            tokens: number of valid target tokens of the update.
        """
        return TrainState(self.update + 1, self.position + samples, self.tokens + tokens)


@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scale of fp16 training, and its lower limit."""

    value: float
    minimum: float


@dataclass(frozen=True)
class UpdateResult:
    """Result of one update, with the same values on every rank."""

    loss: float
    """mean loss over the global batch before the update, in nats per token"""
    grad_norm: float
    """gradient norm of the whole model before clipping"""
    lr: float
    """learning rate of this update"""
    tokens: int
    """number of valid target tokens of the global batch"""
    made: bool = True
    """False if weights and optimizer are unchanged because the loss was rejected or the gradient was not finite"""
    scale: LossScale | None = None
