"""Precision of training, taken from the recipe, or from the DeepSpeed config if the recipe does not set it."""

from __future__ import annotations

from typing import Any

from megagpt.config.deepspeed.ownership import OwnedKey, ownership_conflict
from megagpt.config.deepspeed.view import ConfigView
from megagpt.config.recipe import Recipe
from megagpt.errors import Problem

PRECISION_KEYS = ("bf16.enabled", "fp16.enabled")


def resolve_precision(view: ConfigView, recipe: Recipe) -> tuple[Recipe, list[Problem]]:
    """Determine the precision of training.

    Args:
        view: the DeepSpeed config.
        recipe: the recipe, whose precision may be None.

    Returns:
        The recipe with its precision filled in, and the problems that were found.
    """
    stated = {key[:4]: view.explicit(key, None) for key in PRECISION_KEYS}
    on = [name for name, enabled in stated.items() if enabled]
    if len(on) == 2:
        do = 'keep one of the two, or write "auto" in both and state precision in the recipe'
        return recipe, [view.problem("bf16 and fp16 are both enabled", PRECISION_KEYS, do)]
    if recipe.precision is None:
        return recipe.model_copy(update={"precision": on[0] if on else "fp32"}), []
    problems = [
        ownership_conflict(OwnedKey(f"{name}.enabled", "precision", "the precision", None), view, recipe)
        for name, enabled in stated.items()
        if enabled is not None and enabled != (recipe.precision == name)
    ]
    return recipe, problems


def fill_precision(config: dict[str, Any], precision: str) -> None:
    """Write the precision into a resolved config.

    Args:
        config: the config, which is modified in place.
        precision: fp32, bf16 or fp16. With bf16, gradients are accumulated in fp32.
    """
    for name in ("bf16", "fp16"):
        config[name] = {**(config.get(name) or {}), "enabled": precision == name}
    if precision == "bf16":
        # By default DeepSpeed accumulates in bf16, which loses small gradients (DeepSpeed #1800, #2768).
        config["data_types"] = {**(config.get("data_types") or {}), "grad_accum_dtype": "fp32"}
