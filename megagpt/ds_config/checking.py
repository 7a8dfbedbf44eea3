"""Every key and value of a DeepSpeed config against what DeepSpeed knows."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megagpt.errors import Problem, closest_match
from megagpt.recipe.reading import ConfigTree
from megagpt.recipe.wording import describe_schema, format_value, join_words

Node = Mapping[str, Any]
"""`{"properties": {name: Node}}` for a section, a JSON schema for a value; see engine/keys.py."""

_BOUNDS = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
}


@dataclass(frozen=True)
class KeyChecker:
    """Checks single keys; what holds between keys is in refusals.py."""

    tree: ConfigTree
    known: Node
    auto_allowed: frozenset[str]
    """keys that may be "auto", because something here fills them"""

    def check(self) -> tuple[list[Problem], frozenset[str]]:
        """The problems, and the keys that are thereby unusable."""
        found = list(self._walk(self.tree.values, self.known, ""))
        return [problem for _, problem in found], frozenset(key for key, _ in found)

    def _walk(self, values: Mapping[str, Any], node: Node, section: str) -> Iterator[tuple[str, Problem]]:
        for name, value in values.items():
            key = f"{section}.{name}" if section else name
            inner = node["properties"].get(name)
            if inner is None:
                yield key, self._unknown(key, node)
            elif inner.get("removed"):
                yield key, self._problem(f"DeepSpeed has removed {key}", key, "take it away")
            elif "deprecated" in inner:
                yield key, self._problem(f"{key} is deprecated", key, f"write {inner['deprecated']}")
            elif value == "auto":
                if key not in self.auto_allowed:
                    do = "write a value, or take the key away for DeepSpeed's default"
                    yield key, self._problem(f'{key} is "auto", and nothing here fills it', key, do)
            elif "properties" in inner and isinstance(value, dict):
                yield from self._walk(value, inner, key)
            elif not matches_schema(value, inner):
                wanted = "keys and values in braces" if "properties" in inner else describe_schema(inner, {})
                yield key, self._problem(f"{key} cannot be {format_value(value)}", key, f"give {wanted}")

    def _problem(self, what: str, key: str, do: str) -> Problem:
        return Problem(what, self.tree.where(key), do)

    def _unknown(self, key: str, node: Node) -> Problem:
        """An unknown key, with the nearest name, or the section that it belongs to."""
        section, _, name = key.rpartition(".")
        homes = [home for home in _keys(self.known) if home.rpartition(".")[2] == name]
        if 0 < len(homes) < 4:  # a name like `enabled` has too many homes to tell
            where_to = join_words(home.rpartition(".")[0] or "the top level" for home in homes)
            do = f"move it to {join_words(homes)}"
            return self._problem(f"misplaced key {key}: {name} belongs to {where_to}", key, do)
        near = closest_match(name, node["properties"])
        if near:
            return self._problem(f"unknown key {key}", key, f"write {f'{section}.{near}' if section else near}")
        do = f"take it away: DeepSpeed has no such key in {section or 'its config'}"
        return self._problem(f"unknown key {key}", key, do)


def matches_schema(value: Any, node: Node) -> bool:
    """Whether a value is of the type and in the range that a JSON schema asks for."""
    if "properties" in node:
        return isinstance(value, dict) or (value is None and bool(node.get("nullable")))
    if "anyOf" in node:
        return any(matches_schema(value, option) for option in node["anyOf"])
    if "type" in node and not _is(value, node["type"]):
        return False
    if "enum" in node:
        return value in node["enum"]
    bounds = [name for name in _BOUNDS if name in node]
    return all(_BOUNDS[name](value, node[name]) for name in bounds)


def _is(value: Any, kind: str) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    tests: Mapping[str, bool] = {
        "integer": number and float(value).is_integer(),
        "number": number,
        "boolean": isinstance(value, bool),
        "string": isinstance(value, str),
        "null": value is None,
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }
    return tests[kind]


def _keys(node: Node, section: str = "") -> Iterator[str]:
    """Every dotted key that may be written."""
    for name, inner in node["properties"].items():
        if inner.get("removed") or "deprecated" in inner:
            continue
        key = f"{section}.{name}" if section else name
        yield key
        if "properties" in inner:
            yield from _keys(inner, key)
