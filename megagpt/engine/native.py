"""What DeepSpeed's engines share: the config they get, their own shards of a checkpoint, their end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from megagpt.ds_config import Resolved
from megagpt.errors import UserError

_TAG = "deepspeed"


def config(resolved: Resolved) -> dict[str, Any]:
    """The config for deepspeed.initialize: without what DeepSpeed is not told, since engine/ does it itself."""
    ours = ("tensor_parallel", "sequence_parallel_size", "train_batch_size")  # the last counts sequence parts
    return {key: value for key, value in resolved.config.items() if key not in ours}


def release(engine: Any) -> None:
    """Free what an engine holds, and the process groups that DeepSpeed would use for the next engine too."""
    engine.destroy()
    groups.mpu = None


def save(engine: Any, folder: Path, rank: int) -> None:
    """Write this rank's shards and random state into `folder`; collective. Exact at the same layout."""
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
