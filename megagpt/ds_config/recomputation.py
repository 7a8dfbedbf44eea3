"""Activations that are computed again instead of kept, under DeepSpeed's own keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megagpt.ds_config.view import ConfigView
from megagpt.errors import Problem

RECOMPUTED_BLOCKS_KEY = (
    "activation_checkpointing.number_checkpoints"  # how many blocks; DeepSpeed leaves that to the model
)
CHECKPOINTS_ON_HOST_KEY = "activation_checkpointing.cpu_checkpointing"


def recomputation(view: ConfigView, blocks: int) -> tuple[int, bool]:
    """How many of the model's blocks are recomputed, and whether what they start from waits in host memory."""
    count = blocks if view.get(RECOMPUTED_BLOCKS_KEY) == "auto" else view.explicit(RECOMPUTED_BLOCKS_KEY, 0)
    return count, bool(view.explicit(CHECKPOINTS_ON_HOST_KEY, False))


def recomputation_problems(view: ConfigView, blocks: int) -> Iterator[Problem]:
    """More blocks than there are, or activations offloaded that are not kept."""
    count, on_host = recomputation(view, blocks)
    if count > blocks:
        do = f'set it to {blocks} or less, or to "auto" for all'
        yield view.problem(
            f"more blocks are to be recomputed than the model has ({blocks})", [RECOMPUTED_BLOCKS_KEY], do
        )
    if on_host and not count:
        what = "only what a recomputed block starts from can wait in host memory, and no block is recomputed"
        do = f'set {RECOMPUTED_BLOCKS_KEY} to a number of blocks, or to "auto" for all'
        yield view.problem(what, [CHECKPOINTS_ON_HOST_KEY], do)


def fill_recomputation(config: dict[str, Any], count: int) -> None:
    """State the number in a resolved config that has the section."""
    section: Mapping[str, Any] | None = config.get("activation_checkpointing")
    if section:
        name = RECOMPUTED_BLOCKS_KEY.rpartition(".")[2]
        config["activation_checkpointing"] = {**section, name: count or None}
