"""Check every key and value of a DeepSpeed config against the keys that DeepSpeed knows."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megagpt.config.syntax.formatting import describe_schema, format_value, join_words, takes_text
from megagpt.config.syntax.paths import expand_path
from megagpt.config.syntax.yaml_reader import ConfigTree, is_yaml_text
from megagpt.errors import Problem, closest_match

Node = Mapping[str, Any]
"""A section as `{"properties": {name: Node}}`, or the JSON schema of a value (see engine/deepspeed_keys.py)."""

_DTYPES = {"enum": ["fp32", "bf16", "fp16"]}
_NULL = {"type": "null"}
_SCHEMAS: Mapping[str, Node] = {  # of keys that DeepSpeed declares without a type, and reads when training starts
    "steps_per_print": {"anyOf": [{"type": "integer", "minimum": 1}, _NULL]},
    "communication_data_type": {"anyOf": [_DTYPES, _NULL]},
    "seq_parallel_communication_data_type": {"anyOf": [_DTYPES, _NULL]},
    "gradient_predivide_factor": {"type": "number", "exclusiveMinimum": 0},
}
_PATH_KEYS = (
    "zero_optimization.offload_param.nvme_path",
    "zero_optimization.offload_optimizer.nvme_path",
    "tensorboard.output_path",
    "csv_monitor.output_path",
    "flops_profiler.output_file",
)
_BOUNDS = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
}


@dataclass(frozen=True)
class KeyChecker:
    """Checks each key on its own. Unsupported settings and combinations are checked in unsupported.py."""

    tree: ConfigTree
    known: Node
    auto_allowed: frozenset[str]
    """keys whose value may be "auto" because megagpt fills them in"""

    def check(self) -> tuple[list[Problem], frozenset[str]]:
        """Return all problems, and the keys whose values cannot be used because of them."""
        problems = list(self._walk(self.tree.values, self.known, ""))
        return [problem for _, problem in problems], frozenset(key for key, _ in problems)

    def _walk(self, values: Mapping[str, Any], node: Node, section: str) -> Iterator[tuple[str, Problem]]:
        for name, value in values.items():
            key = f"{section}.{name}" if section else name
            inner = node["properties"].get(name)
            inner = _SCHEMAS.get(key, inner)
            if inner is None:
                yield key, self._unknown(key, node)
            elif inner.get("removed"):
                yield key, self._problem(f"DeepSpeed has removed {key}", key, "remove it")
            elif "deprecated" in inner:
                yield key, self._problem(f"{key} is deprecated", key, f"write {inner['deprecated']}")
            elif value == "auto":
                if key not in self.auto_allowed:
                    do = "write a value, or remove the key for DeepSpeed's default"
                    yield key, self._problem(f'{key} is "auto", but megagpt does not fill it in', key, do)
            elif "properties" in inner and isinstance(value, dict):
                yield from self._walk(value, inner, key)
            elif not matches_schema(value, inner):
                wanted = "keys and values in braces" if "properties" in inner else describe_schema(inner, {})
                yield key, self._problem(f"{key} cannot be {format_value(value)}", key, f"give {wanted}")

    def _problem(self, what: str, key: str, do: str) -> Problem:
        return Problem(what, self.tree.where(key), do)

    def _unknown(self, key: str, node: Node) -> Problem:
        """Return the problem of an unknown key, which suggests the most similar key or the section it belongs to."""
        section, _, name = key.rpartition(".")
        same_name = [other for other in _keys(self.known) if other.rpartition(".")[2] == name]
        # A name such as `enabled` occurs in too many sections to suggest one of them.
        if 0 < len(same_name) < 4:
            sections = join_words(other.rpartition(".")[0] or "the top level" for other in same_name)
            do = f"move it to {join_words(same_name)}"
            return self._problem(f"misplaced key {key}: {name} belongs to {sections}", key, do)
        near = closest_match(name, node["properties"])
        if near:
            return self._problem(f"unknown key {key}", key, f"write {f'{section}.{near}' if section else near}")
        do = f"remove it: DeepSpeed has no such key in {section or 'its config'}"
        return self._problem(f"unknown key {key}", key, do)


def is_literal(known: Node, key: str, text: str) -> bool:
    """Return whether the value of an override is used literally instead of being parsed as YAML.

    This is the case for keys that hold text.

    Args:
        known: the keys that DeepSpeed knows.
        key: dotted key of the DeepSpeed config.
        text: the value as the user wrote it.
    """
    node: Node = known
    for name in key.split("."):
        node = node.get("properties", {}).get(name, {})
    return takes_text(node) and not is_yaml_text(text)


def expand_paths(tree: ConfigTree) -> None:
    """Expand `~` and environment variables in the paths of a DeepSpeed config. Problems are added to the tree.

    Args:
        tree: the config, which is modified in place.
    """
    for key in _PATH_KEYS:
        *outer, last = key.split(".")
        section: Any = tree.values
        for name in outer:
            section = section.get(name) if isinstance(section, dict) else None
        value = section.get(last) if isinstance(section, dict) else None
        if not isinstance(value, str):
            continue
        try:
            section[last] = expand_path(value)
        except ValueError as error:
            do = "set it on every node, or write the path out"
            tree.problems.append(Problem(f"{key} cannot be expanded: {error}", tree.where(key), do))


def matches_schema(value: Any, node: Node) -> bool:
    """Return whether a value has the type and range that a JSON schema requires.

    Args:
        value: the value to check.
        node: the JSON schema of the value, or a section of keys.
    """
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
    """Yield every dotted key except those that are removed or deprecated."""
    for name, inner in node["properties"].items():
        if inner.get("removed") or "deprecated" in inner:
            continue
        key = f"{section}.{name}" if section else name
        yield key
        if "properties" in inner:
            yield from _keys(inner, key)
