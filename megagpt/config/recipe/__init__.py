"""The recipe, a YAML file that defines what is trained. This package imports neither torch nor DeepSpeed."""

from __future__ import annotations

from megagpt.config.recipe.loading import load, to_yaml, total_updates
from megagpt.config.recipe.presets import PRESETS
from megagpt.config.recipe.sections import DataSection, ModelSection, Recipe, Source

__all__ = ["PRESETS", "DataSection", "ModelSection", "Recipe", "Source", "load", "to_yaml", "total_updates"]
