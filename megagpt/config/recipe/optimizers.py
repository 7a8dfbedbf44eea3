"""The optimizers that a recipe can choose, with the facts about each that checks, planning and checkpoints need.

A new optimizer needs an entry here, its type and keys in OptimizerSection (config/recipe/sections.py), and its
implementation (engine/optim/build.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerKey:
    """A key of the recipe's section `optimizer` that only one optimizer has."""

    name: str
    advice: str | None = None
    """how to choose the value if the key is required; None if it has a default"""


@dataclass(frozen=True)
class DeepSpeedParameter:
    """A key of DeepSpeed's `optimizer.params` whose value follows from the recipe."""

    name: str
    recipe_key: str
    description: str


@dataclass(frozen=True)
class OptimizerFacts:
    """What is known about an optimizer apart from its implementation."""

    deepspeed_type: str
    """its name in DeepSpeed configs"""
    states: tuple[str, ...]
    """names of the fp32 states with one value per element, as in checkpoints"""
    matrix_states: int
    """number of these states for an element of a block's matrix"""
    steps_on_whole_matrices: bool = False
    """whether the step reassembles sharded matrices"""
    keys: tuple[OptimizerKey, ...] = ()
    deepspeed_parameters: tuple[DeepSpeedParameter, ...] = ()
    """parameters besides those of AdamW"""


OPTIMIZERS: Mapping[str, OptimizerFacts] = {
    "adamw": OptimizerFacts("AdamW", states=("exp_avg", "exp_avg_sq"), matrix_states=2),
    "muon": OptimizerFacts(
        "Muon",
        states=("exp_avg", "exp_avg_sq", "momentum_buffer"),
        matrix_states=1,
        steps_on_whole_matrices=True,
        keys=(
            OptimizerKey("muon_lr", "give the peak learning rate of the block matrices, often 0.02"),
            OptimizerKey("muon_momentum"),
        ),
        deepspeed_parameters=(
            DeepSpeedParameter("adam_lr", "lr", "AdamW's learning rate"),
            DeepSpeedParameter("muon_lr", "muon_lr", "Muon's learning rate"),
            DeepSpeedParameter("momentum", "muon_momentum", "Muon's momentum"),
        ),
    ),
}
