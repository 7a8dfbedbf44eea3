"""`megagpt keys`: the keys of a recipe, from the sections that check it, so that no list can go stale."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megagpt.errors import UserError, nearest
from megagpt.recipe import Recipe
from megagpt.recipe.presets import PRESETS


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, what may stand there, the default ("": must be given), and what it means."""

    name: str
    type: str
    default: str
    help: str


@dataclass(frozen=True)
class Keys:
    """Keys in the order of a recipe, and the names of the published shapes for model.preset."""

    keys: tuple[Key, ...]
    presets: tuple[str, ...]

    def __str__(self) -> str:
        lines: list[str] = []
        section = ""
        for key in self.keys:
            head = key.name.rpartition(".")[0]
            lines += [""] if head != section and lines else []
            section = head
            default = f" = {key.default}" if key.default else ""
            lines += [f"{key.name}: {key.type}{default}", f"    {key.help}"]
        return "\n".join([*lines, "", f"model.preset: {', '.join(self.presets)}"])


def keys(names: tuple[str, ...] = ()) -> Keys:
    """All keys, or those that one of `names` is a section or a part of. Raises UserError for a name that is neither."""
    every = tuple(_keys(Recipe, ""))
    wanted = {
        name: [key for key in every if name in (key.name, *key.name.split("."), *_above(key.name))] for name in names
    }
    for name, found in wanted.items():
        if not found:
            near = nearest(name, {part for key in every for part in (key.name, *key.name.split("."))})
            raise UserError(
                f"no key of a recipe has the name {name}", "", f"try {near}" if near else "name none to see all"
            )
    chosen = tuple(key for key in every if not names or any(key in found for found in wanted.values()))
    return Keys(chosen, tuple(PRESETS))


def _above(name: str) -> Iterator[str]:
    """`a.b.c`: a, a.b."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _keys(section: type[BaseModel], dot: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        if inner is not None:
            yield from _keys(inner, f"{dot}{name}.")
            continue
        yield Key(dot + name, _type(field.annotation), _default(field), " ".join((field.description or "").split()))
        for part in (kind for kind in _parts(field.annotation) if _section(kind)):
            yield from _keys(part, f"{dot}{name}[].")


def _section(kind: Any) -> type[BaseModel] | None:
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _parts(kind: Any) -> Iterator[Any]:
    """The types that a type is made of, itself first."""
    yield kind
    for part in get_args(kind):
        yield from _parts(part)


def _type(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin is Annotated:
        return _type(parts[0])
    if origin in (Union, types.UnionType):
        return " | ".join(_type(part) for part in parts)
    if origin is tuple:
        inner = ", ".join(_type(part) for part in parts if part is not ...)
        return f"[{inner}, …]" if ... in parts else f"[{inner}]"
    names = {int: "whole number", float: "number", str: "text", bool: "true | false", type(None): "null"}
    return names.get(kind) or re.sub(r"(?<!^)Section$", "", kind.__name__).lower()


def _default(field: FieldInfo) -> str:
    if field.is_required() or field.default_factory is not None:  # derived from other keys: the help says how
        return ""
    value = field.default
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)
