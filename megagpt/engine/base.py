"""The face of an engine: all that the training loop knows of DeepSpeed."""

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
    """Trains one model on one layout. Every method is called by all ranks, in the same order."""

    def train_update(
        self, batches: Sequence[Batch], accept: Accept = math.isfinite, at_step: AtStep = ignore_step
    ) -> UpdateResult:
        """Make one update over this rank's micro-batches: forward, backward, clip, step, schedule.

        An update whose loss `accept` refuses, or whose gradient is not finite, is not made. Everything is then as
        before, except for fp16's loss scale, which an accepted loss with an infinite gradient lowers.

        Args:
            batches: this rank's micro-batches, equally many on every rank.
            accept: decides by the loss over the global batch whether the update may be made. It is called once
                before the step, on the ranks that compute the loss: of a pipeline, those of the last stage. It must
                depend on the loss alone.
            at_step: called once on every rank when it begins the step: with the last backward pass, in which
                gradients are reduced, or on a pipeline after it.
        """
        ...

    def replicas_differ(self) -> list[str]:
        """A line for each weight that several ranks should hold alike and do not; collective, the same on all."""
        ...

    def evaluate(self, batches: Iterable[Batch], should_stop: ShouldStop = never_stop) -> float | None:
        """Return the loss in nats per valid token over the batches of all ranks. Changes no state.

        Args:
            batches: this rank's batches, equally many on every rank.
            should_stop: called on every rank before each forward pass, so it may be collective; all ranks must get
                the same answer.

        Returns:
            The loss, the same on every rank, or None if `should_stop` ended the evaluation early.
        """
        ...

    def save_state(self, sink: WriteFile) -> None:
        """Write all that `load_state` needs, file by file, through `sink`; the weights by name are among it."""
        ...

    def load_state(self, folder: Path) -> None:
        """Restore weights, optimizer, schedule and random state, whatever layout saved them."""
        ...

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter whole, by its name in `GPT`, in fp32 on the host. Tied ones come once."""
        ...

    def release(self) -> None:
        """Free what the engine holds; the process group stays, for another engine."""
        ...

    def close(self) -> None:
        """Leave the process group."""
        ...
