"""Activation checkpointing, which recomputes activations in the backward pass instead of keeping them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megagpt.config.deepspeed.view import ConfigView
from megagpt.errors import Problem

# The value is a number of blocks. DeepSpeed itself leaves the meaning of this key to the model.
RECOMPUTED_BLOCKS_KEY = "activation_checkpointing.number_checkpoints"
CHECKPOINTS_ON_HOST_KEY = "activation_checkpointing.cpu_checkpointing"


def recomputation(view: ConfigView, blocks: int) -> tuple[int, bool]:
    """Read the settings of activation checkpointing.

    Args:
        view: the DeepSpeed config.
        blocks: number of transformer blocks of the model.

    Returns:
        The number of blocks that are recomputed, and whether their inputs are kept in host memory.
    """
    count = blocks if view.get(RECOMPUTED_BLOCKS_KEY) == "auto" else view.explicit(RECOMPUTED_BLOCKS_KEY, 0)
    return count, bool(view.explicit(CHECKPOINTS_ON_HOST_KEY, False))


def recomputation_problems(view: ConfigView, blocks: int) -> Iterator[Problem]:
    """Yield a problem if more blocks are recomputed than exist, or if offloading is on but no block is recomputed.

    Args:
        view: the DeepSpeed config.
        blocks: number of transformer blocks of the model.
    """
    count, on_host = recomputation(view, blocks)
    if count > blocks:
        do = f'set it to {blocks} or less, or to "auto" for all'
        yield view.problem(
            f"the number of recomputed blocks is larger than the number of blocks of the model ({blocks})",
            [RECOMPUTED_BLOCKS_KEY],
            do,
        )
    if on_host and not count:
        what = "only the inputs of recomputed blocks can be kept in host memory, but no block is recomputed"
        do = f'set {RECOMPUTED_BLOCKS_KEY} to a number of blocks, or to "auto" for all'
        yield view.problem(what, [CHECKPOINTS_ON_HOST_KEY], do)


def fill_recomputation(config: dict[str, Any], count: int) -> None:
    """Write the number of recomputed blocks into a resolved config that has the section.

    Args:
        config: the config, which is modified in place.
        count: number of recomputed blocks.
    """
    section: Mapping[str, Any] | None = config.get("activation_checkpointing")
    if section:
        name = RECOMPUTED_BLOCKS_KEY.rpartition(".")[2]
        config["activation_checkpointing"] = {**section, name: count or None}
