"""The optimizers that a recipe can choose, and the properties of each that checks, planning and checkpoints need.

To add an optimizer, add an entry here, its type and keys in OptimizerSection (config/recipe/sections.py), and its
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
    """advice on how to choose the value if the key is required; None if the key has a default"""


@dataclass(frozen=True)
class DeepSpeedParameter:
    """A key of DeepSpeed's `optimizer.params` whose value follows from the recipe."""

    name: str
    recipe_key: str
    description: str


@dataclass(frozen=True)
class OptimizerFacts:
    """Properties of an optimizer that are needed outside of its implementation."""

    deepspeed_type: str
    """name of the optimizer in DeepSpeed configs"""
    states: tuple[str, ...]
    """names, as used in checkpoints, of the fp32 states that have one value per element"""
    matrix_states: int
    """number of these states that each matrix of a transformer block has"""
    steps_on_whole_matrices: bool = False
    """whether sharded matrices are reassembled for the optimizer step"""
    keys: tuple[OptimizerKey, ...] = ()
    deepspeed_parameters: tuple[DeepSpeedParameter, ...] = ()
    """DeepSpeed parameters that the optimizer has in addition to those of AdamW"""


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
