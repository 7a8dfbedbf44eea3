"""YAML text and `key=value` words as nested plain values, with the place of every key.

Scalars follow YAML 1.2's core schema, where PyYAML by itself follows 1.1: there 6e-4 is text, `no` is
false and 12:30 is 750. Digits may be grouped as in 1_000_000.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megagpt.errors import Problem, UserError
from megagpt.recipe.places import SourceLocation

_TAG = "tag:yaml.org,2002:"
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_RESOLVERS = (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", rf"[-+]?{_DIGITS}", list("-+0123456789")),
    (
        "float",
        rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
    ("float", r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))", list("-+.")),
)
_CONVERT: Mapping[str, Callable[[str], Any]] = {
    f"{_TAG}null": lambda text: None,
    f"{_TAG}bool": lambda text: text.lower() == "true",
    f"{_TAG}int": int,
    f"{_TAG}float": lambda text: float(re.sub(r"\.(inf|nan)", r"\1", text.lower())),
    f"{_TAG}str": str,
}


class _Loader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own way)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call, unused-ignore]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not used here", problem_mark=mark)
        return super().compose_node(parent, index)


class CoreDumper(yaml.SafeDumper):  # type: ignore[misc, unused-ignore]
    """Writes what this module reads back equal."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


def _write_text(dumper: CoreDumper, text: str) -> yaml.Node:
    """Text with line breaks or control characters goes into double quotes: PyYAML's other styles lose some."""
    node: yaml.Node = dumper.represent_scalar(f"{_TAG}str", text, style=None if text.isprintable() else '"')
    return node


CoreDumper.add_representer(str, _write_text)
for _name, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, CoreDumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"^{_pattern}$"), _first)


@dataclass
class ConfigTree:
    """Nested values of one file, the place of each dotted key, and what was wrong with the text itself."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    locations: dict[str, SourceLocation] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def where(self, key: str) -> str:
        """`FILE:LINE  key`: of the enclosing key that has a place, where `key` itself has none."""
        owner = key
        while owner and owner not in self.locations:
            owner = owner.rpartition(".")[0]
        place = self.locations.get(owner, SourceLocation(self.name, key))
        return f"{place.at}  {place.word if owner == key else key}"

    def value(self, key: str) -> Any:
        """The value of a dotted key. Raises KeyError if it was not given."""
        inner: Any = self.values
        for part in key.split("."):
            if not isinstance(inner, dict):
                raise KeyError(key)
            inner = inner[part]
        return inner

    def add(self, key: str, place: SourceLocation) -> None:
        """Note where a key stands; a second time is a problem."""
        if key in self.locations:
            where = f"{self.where(key)}\n{place.at}  {place.word}"
            self.problems.append(Problem(f"{key} is given twice", where, "keep one of the two"))
        self.locations[key] = place

    def override(self, word: str, prefix: str = "") -> None:
        """Put one `key=value` of the command line, less `prefix`, over the file's value."""
        key, equals, text = word.removeprefix(prefix).partition("=")
        place = SourceLocation("command line", word)
        if not (equals and key):
            do = f"write {prefix}KEY=VALUE"
            self.problems.append(Problem(f'"{word}" is not key=value', "command line", do))
            return
        inside = ConfigTree(self.name)
        try:
            value = _parse(text, inside, key, lambda inner, node: place)
        except yaml.YAMLError as error:
            what = f"the value of {key} is not valid YAML: {_reason(error)}"
            self.problems.append(Problem(what, f"command line  {word}", "put it in quotes"))
            return
        kept = {k: at for k, at in self.locations.items() if k != key and not k.startswith(f"{key}.")}
        self.locations = {**kept, **inside.locations, key: place}
        self.problems += inside.problems
        *outer, last = key.split(".")
        inner = self.values
        for part in outer:
            if not isinstance(inner.get(part), dict):
                inner[part] = {}
            inner = inner[part]
        inner[last] = value


def read_text(path: str | Path) -> str:
    """The text of a file. Raises UserError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", do="check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", f"byte {error.start}", "save it as UTF-8") from error


def read_yaml(path: str | Path) -> ConfigTree:
    """Read a YAML file whose top level is keys and values. Raises UserError if it has another form."""
    name, tree = str(path), ConfigTree(str(path))
    text = read_text(path)
    try:
        values = _parse(text, tree, "", lambda key, node: SourceLocation(f"{name}:{node.start_mark.line + 1}", key))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise UserError(f"{name} is not valid YAML: {_reason(error)}", where, "mend that line") from error
    if not isinstance(values, dict):
        raise UserError(f"{name} has no keys and values", name, "see launch/recipes for examples")
    tree.values = values
    return tree


_LocationOf = Callable[[str, yaml.Node], SourceLocation]


def _parse(text: str, tree: ConfigTree, key: str, location_of: _LocationOf) -> Any:
    node = yaml.compose(text, Loader=_Loader)
    return None if node is None else _value(node, tree, key, location_of)


def _value(node: yaml.Node, tree: ConfigTree, key: str, location_of: _LocationOf) -> Any:
    """The plain value of a node; notes the places of the keys inside it."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag not in _CONVERT:
            raise yaml.MarkedYAMLError(problem=f"unknown tag {node.tag}", problem_mark=node.start_mark)
        return _CONVERT[node.tag](node.value)
    dot = f"{key}." if key else ""
    if isinstance(node, yaml.SequenceNode):
        items = [(str(index), item, item) for index, item in enumerate(node.value)]
    else:
        items = [(_key(name), name, item) for name, item in node.value]
    values = {}
    for name, at, item in items:
        if not name or "." in name:
            where = location_of(key, at).at
            tree.problems.append(Problem(f'"{name}" is not a key', where, "write keys inside their section"))
            continue
        tree.add(dot + name, location_of(dot + name, at))
        values[name] = _value(item, tree, dot + name, location_of)
    return list(values.values()) if isinstance(node, yaml.SequenceNode) else values


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.MarkedYAMLError(problem="a key must be one word", problem_mark=node.start_mark)
    return str(node.value)


def _reason(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
