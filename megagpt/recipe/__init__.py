"""The recipe: one YAML file that defines what is trained. Imports neither torch nor DeepSpeed."""

from __future__ import annotations

from megagpt.recipe.loading import load, to_yaml, total_updates
from megagpt.recipe.presets import PRESETS
from megagpt.recipe.sections import DataSection, ModelSection, Recipe, Source

__all__ = ["PRESETS", "DataSection", "ModelSection", "Recipe", "Source", "load", "to_yaml", "total_updates"]
