"""DeepSpeed's own shards of a checkpoint, and the random state of each rank: exact at the same layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from megagpt.errors import UserError

_TAG = "deepspeed"


def save(engine: Any, folder: Path, rank: int) -> None:
    """Write this rank's part into `folder`; collective."""
    engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
    state = {"cpu": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        state["device"] = get_accelerator().get_rng_state()
    torch.save(state, folder / f"random-{rank}.pt")


@torch.no_grad()  # a pipeline broadcasts its tied matrix, which would else count as an operation on it
def load(engine: Any, folder: Path, rank: int) -> None:
    """Restore what `save` wrote; collective. Raises UserError where DeepSpeed finds nothing to load."""
    path, _ = engine.load_checkpoint(str(folder), tag=_TAG)
    if path is None:
        raise UserError(
            "DeepSpeed could not load its part of the checkpoint",
            str(folder / _TAG),
            "remove this checkpoint so that the one before it is taken",
        )
    state = torch.load(folder / f"random-{rank}.pt", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "device" in state:
        get_accelerator().set_rng_state(state["device"])
