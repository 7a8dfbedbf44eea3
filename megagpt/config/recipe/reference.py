"""Implementation of `megagpt keys`, a reference of the recipe keys generated from the classes that validate recipes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megagpt.config.recipe import Recipe
from megagpt.config.recipe.presets import PRESETS
from megagpt.config.syntax.formatting import describe_schema, format_value
from megagpt.errors import UserError, closest_match


@dataclass(frozen=True)
class RecipeKey:
    """One key of a recipe."""

    name: str
    """dotted name, in which `[]` stands for an item of a list"""
    type: str
    """description of the allowed values"""
    default: str
    """default as it is written in YAML; "" if the key is required or its default is derived from other keys"""
    help: str


@dataclass(frozen=True)
class KeyReference:
    """Keys in the order in which a recipe lists them, and the names of the model presets."""

    keys: tuple[RecipeKey, ...]
    presets: tuple[str, ...]

    def __str__(self) -> str:
        lines: list[str] = []
        section = ""
        for key in self.keys:
            previous, section = section, key.name.rpartition(".")[0]
            if lines and section != previous:
                lines.append("")
            default = f" = {key.default}" if key.default else ""
            lines += [f"{key.name}{default}   ({key.type})", f"    {key.help}"]
        return "\n".join([*lines, "", f"model.preset: {', '.join(self.presets)}"])


def keys(names: tuple[str, ...] = ()) -> KeyReference:
    """Return the reference of all keys, or of selected keys.

    Args:
        names: sections (`data`), dotted keys (`optimizer.lr`) or parts of dotted keys (`lr`). An empty tuple selects
            all keys.

    Raises:
        UserError: A name matches no key.
    """
    schema = Recipe.model_json_schema()
    all_keys = tuple(_keys(schema, "", schema["$defs"]))
    for name in names:
        if not any(_matches(key, name) for key in all_keys):
            near = closest_match(name, {part for key in all_keys for part in (key.name, *key.name.split("."))})
            do = f"try {near}" if near else "give no name to list all keys"
            raise UserError(f"no key of a recipe has the name {name}", "", do)
    chosen = tuple(key for key in all_keys if not names or any(_matches(key, name) for name in names))
    return KeyReference(chosen, tuple(PRESETS))


def _matches(key: RecipeKey, name: str) -> bool:
    """Return whether `name` is the key, a section that contains it, or one part of its dotted name."""
    return key.name == name or key.name.startswith(f"{name}.") or name in key.name.split(".")


def _keys(section: Mapping[str, Any], dot: str, definitions: Mapping[str, Any]) -> Iterator[RecipeKey]:
    for name, schema in section["properties"].items():
        if "$ref" in schema and "properties" in (inner := _definition(schema, definitions)):
            yield from _keys(inner, f"{dot}{name}.", definitions)
            continue
        help_text = " ".join(schema["description"].split())
        default = format_value(schema["default"]) if "default" in schema else ""
        yield RecipeKey(dot + name, describe_schema(schema, definitions), default, help_text)
        if "$ref" in schema.get("items", {}):
            yield from _keys(_definition(schema["items"], definitions), f"{dot}{name}[].", definitions)


def _definition(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = definitions[schema["$ref"].rpartition("/")[2]]
    return found
