"""`megagpt keys`: the keys of a recipe, from the sections that check it, so that no list can go stale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megagpt.errors import UserError, closest_match
from megagpt.recipe import Recipe
from megagpt.recipe.presets import PRESETS
from megagpt.recipe.wording import describe_schema, format_value


@dataclass(frozen=True)
class RecipeKey:
    """One key: its dotted name, what may stand there, the default ("": must be given), and what it means."""

    name: str
    type: str
    default: str
    help: str


@dataclass(frozen=True)
class Keys:
    """Keys in the order of a recipe, and the names of the published shapes for model.preset."""

    keys: tuple[RecipeKey, ...]
    presets: tuple[str, ...]

    def __str__(self) -> str:
        lines: list[str] = []
        section = ""
        for key in self.keys:
            head = key.name.rpartition(".")[0]
            lines += [""] if head != section and lines else []
            section = head
            default = f" = {key.default}" if key.default else ""
            lines += [f"{key.name}{default}   ({key.type})", f"    {key.help}"]
        return "\n".join([*lines, "", f"model.preset: {', '.join(self.presets)}"])


def keys(names: tuple[str, ...] = ()) -> Keys:
    """All keys, or those that one of `names` is a section or a part of. Raises UserError for a name that is neither."""
    schema = Recipe.model_json_schema()
    every = tuple(_keys(schema, "", schema["$defs"]))
    wanted = {
        name: [key for key in every if name in (key.name, *key.name.split("."), *_above(key.name))] for name in names
    }
    for name, found in wanted.items():
        if not found:
            near = closest_match(name, {part for key in every for part in (key.name, *key.name.split("."))})
            raise UserError(
                f"no key of a recipe has the name {name}", "", f"try {near}" if near else "name none to see all"
            )
    chosen = tuple(key for key in every if not names or any(key in found for found in wanted.values()))
    return Keys(chosen, tuple(PRESETS))


def _above(name: str) -> Iterator[str]:
    """`a.b.c`: a, a.b."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _keys(section: Mapping[str, Any], dot: str, definitions: Mapping[str, Any]) -> Iterator[RecipeKey]:
    for name, schema in section["properties"].items():
        if "$ref" in schema and "properties" in (inner := _definition(schema, definitions)):
            yield from _keys(inner, f"{dot}{name}.", definitions)
            continue
        help_text = " ".join(schema["description"].split())
        default = (
            format_value(schema["default"]) if "default" in schema else ""
        )  # else it is derived, and the help says how
        yield RecipeKey(dot + name, describe_schema(schema, definitions), default, help_text)
        if "$ref" in schema.get("items", {}):
            yield from _keys(_definition(schema["items"], definitions), f"{dot}{name}[].", definitions)


def _definition(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = definitions[schema["$ref"].rpartition("/")[2]]
    return found
