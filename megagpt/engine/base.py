"""The interface of an engine: all that the training loop knows about DeepSpeed."""

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
    """Do nothing when the step begins."""


def never_stop() -> bool:
    """Let an evaluation run to its end."""
    return False


class Engine(Protocol):
    """Trains one model on one layout. Every method is called on all ranks, in the same order."""

    def train_update(
        self, batches: Sequence[Batch], accept: Accept = math.isfinite, at_step: AtStep = ignore_step
    ) -> UpdateResult:
        """Run one update on this rank's micro-batches: forward, backward, clipping, optimizer step, schedule.

        The update is skipped if `accept` rejects its loss or if its gradient is not finite. All state is then as
        before, except for fp16's loss scale, which decreases if the loss was accepted but the gradient was infinite.

        Args:
            batches: This rank's micro-batches; their number is the same on every rank.
            accept: Decides from the loss of the global batch whether to make the update. It is called once before
                the step, on the ranks that compute the loss (in a pipeline, those of the last stage), and must depend
                on the loss alone.
            at_step: Called once on every rank when the step begins. That is in the last backward pass, in which
                gradients are reduced, or in a pipeline after it.
        """
        ...

    def replicas_differ(self) -> list[str]:
        """Describe each weight that differs between ranks that replicate it. Collective, the same on every rank."""
        ...

    def evaluate(self, batches: Iterable[Batch], should_stop: ShouldStop = never_stop) -> float | None:
        """Return the loss in nats per valid token over all ranks' batches, without changing any state.

        Args:
            batches: This rank's batches; their number is the same on every rank.
            should_stop: Called on every rank before each forward pass, so it may be collective. All ranks must get the
                same answer.

        Returns:
            The loss, the same on every rank, or None if `should_stop` ended the evaluation early.
        """
        ...

    def save_state(self, sink: WriteFile) -> None:
        """Write everything that `load_state` needs through `sink`, file by file, including the weights by name."""
        ...

    def load_state(self, folder: Path) -> None:
        """Restore weights, optimizer, schedule and RNG state, whatever layout saved them."""
        ...

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each whole parameter with its name in `GPT`, in fp32 on the host. A tied parameter comes once."""
        ...

    def release(self) -> None:
        """Free what the engine holds. The process group remains, for another engine."""
        ...

    def close(self) -> None:
        """Release the engine and leave the process group."""
        ...
