"""Interface of the training engines. The training loop uses DeepSpeed only through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from megagpt.data.loader import Batch
from megagpt.files import WriteFile
from megagpt.state import UpdateResult

Accept = Callable[[float], bool]
AtStep = Callable[[], None]
ShouldStop = Callable[[], bool]


def ignore_step() -> None:
    """Do nothing. This is the default of `at_step`."""


def never_stop() -> bool:
    """Return False, so that an evaluation runs to its end. This is the default of `should_stop`."""
    return False


class Engine(Protocol):
    """Engine that trains one model on one layout. All ranks must call its methods in the same order."""

    def train_update(
        self, batches: Sequence[Batch], accept: Accept = math.isfinite, at_step: AtStep = ignore_step
    ) -> UpdateResult:
        """Run one update: the passes over this rank's micro-batches, clipping, the optimizer step and the schedule.

        The update is skipped if `accept` rejects its loss or if its gradient is not finite. A skipped update leaves all
        state unchanged, except that the fp16 loss scale decreases if the loss was accepted but the gradient was not
        finite.

        Args:
            batches: This rank's micro-batches. Every rank has the same number of them.
            accept: Function that returns whether to apply the update, given the loss of the global batch. It is called
                once before the step, on the ranks that compute the loss (in a pipeline, the ranks of the last stage).
                Its result must depend on the loss alone.
            at_step: Function that is called once on every rank when the step begins. Without a pipeline, the step
                begins before the last backward pass, which also reduces the gradients. In a pipeline, it begins after
                that pass.

        Returns:
            The loss, gradient norm, learning rate and number of tokens of the update, and whether it was applied.
        """
        ...

    def replicas_differ(self) -> list[str]:
        """Return a description of each weight that differs between its replicas. Collective.

        The result is the same on every rank.
        """
        ...

    def evaluate(self, batches: Iterable[Batch], should_stop: ShouldStop = never_stop) -> float | None:
        """Return the loss in nats per valid token over all ranks' batches, without changing any state.

        Args:
            batches: This rank's batches. Every rank has the same number of them.
            should_stop: Function that returns whether to stop. It is called on every rank before each forward pass, so
                it may be collective. It must return the same value on all ranks.

        Returns:
            The loss, the same on every rank, or None if `should_stop` ended the evaluation early.
        """
        ...

    def save_state(self, sink: WriteFile) -> None:
        """Write all files that `load_state` needs, including the weights by name, by calling `sink` for each file."""
        ...

    def load_state(self, folder: Path) -> None:
        """Restore weights, optimizer, schedule and RNG state from a checkpoint that was saved with any layout."""
        ...

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name in `GPT` and the whole fp32 tensor, on the host, of each parameter.

        A tied parameter is yielded once.
        """
        ...

    def release(self) -> None:
        """Free the memory of the engine. The process group remains, so that another engine can use it."""
        ...

    def close(self) -> None:
        """Release the engine and leave the process group."""
        ...
