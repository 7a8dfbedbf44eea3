"""Parse YAML files and `key=value` overrides into nested plain values, and record the source location of every key.

Scalars follow the core schema of YAML 1.2. PyYAML by itself follows YAML 1.1, in which 6e-4 is a string, `no` is false
and 12:30 is 750. Digits may be grouped, as in 1_000_000.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megagpt.config.syntax.locations import SourceLocation
from megagpt.errors import Problem, UserError

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
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own convention)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call, unused-ignore]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not used here", problem_mark=mark)
        return super().compose_node(parent, index)


class CoreDumper(yaml.SafeDumper):  # type: ignore[misc, unused-ignore]
    """YAML dumper whose output this module parses back to equal values."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


def _write_text(dumper: CoreDumper, text: str) -> yaml.Node:
    """Write text, in double quotes if it has line breaks or control characters, which other styles may not preserve."""
    node: yaml.Node = dumper.represent_scalar(f"{_TAG}str", text, style=None if text.isprintable() else '"')
    return node


CoreDumper.add_representer(str, _write_text)
for _name, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, CoreDumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"^{_pattern}$"), _first)


@dataclass
class ConfigTree:
    """Nested values of one config file, with the source location of each dotted key."""

    name: str
    """path of the file, as the user gave it"""
    values: dict[str, Any] = field(default_factory=dict)
    locations: dict[str, SourceLocation] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    """mistakes in the text itself, such as a duplicate key"""

    def where(self, key: str) -> str:
        """Return the location of a key as `FILE:LINE  key`.

        If the key itself has no location, use that of the first key inside it, or else that of the nearest enclosing
        section.
        """
        owner = key
        if self.key_inside(key) != key:
            location = self.locations[self.key_inside(key)]
            return f"{location.at}  {location.text}"
        while owner and owner not in self.locations:
            owner = owner.rpartition(".")[0]
        location = self.locations.get(owner, SourceLocation(self.name, key))
        return f"{location.at}  {location.text if owner == key else key}"

    def key_inside(self, key: str) -> str:
        """Return `key`, unless it has no location and a key inside it was given. Then return the first such key."""
        inside = (other for other in self.locations if other.startswith(f"{key}."))
        return key if key in self.locations else next(inside, key)

    def value(self, key: str) -> Any:
        """Return the value of a dotted key. Raises KeyError if it was not given."""
        inner: Any = self.values
        for part in key.split("."):
            if not isinstance(inner, dict):
                raise KeyError(key)
            inner = inner[part]
        return inner

    def add_location(self, key: str, location: SourceLocation) -> None:
        """Record the location of a key. Adds a problem if the key already has a location."""
        if key in self.locations:
            where = f"{self.where(key)}\n{location.at}  {location.text}"
            self.problems.append(Problem(f"{key} is given twice", where, "keep one of the two"))
        self.locations[key] = location

    def override(self, argument: str, prefix: str = "", is_literal: Callable[[str, str], bool] | None = None) -> None:
        """Replace a value of the file with the value of a `key=value` argument from the command line.

        Args:
            argument: the argument.
            prefix: prefix of the argument that does not belong to the key, such as "ds.".
            is_literal: function of a key and its value that returns whether the value is used literally. All other
                values are parsed as YAML, in which `exp #3` is `exp` and `1984` is a number.
        """
        key, equals, text = argument.removeprefix(prefix).partition("=")
        location = SourceLocation("command line", argument)
        if not (equals and key):
            do = f"write {prefix}KEY=VALUE"
            self.problems.append(Problem(f'"{argument}" is not key=value', "command line", do))
            return
        inside = ConfigTree(self.name)
        try:
            literal = is_literal is not None and is_literal(key, text)
            value = text if literal else _parse(text, inside, key, lambda inner, node: location)
        except (yaml.YAMLError, RecursionError) as error:
            what = f"the value of {key} is not valid YAML: {_reason(error)}"
            self.problems.append(Problem(what, f"command line  {argument}", "put it in quotes"))
            return
        kept = {k: at for k, at in self.locations.items() if k != key and not k.startswith(f"{key}.")}
        self.locations = {**kept, **inside.locations, key: location}
        self.problems += inside.problems
        *outer, last = key.split(".")
        inner = self.values
        for part in outer:
            if not isinstance(inner.get(part), dict):
                inner[part] = {}
            inner = inner[part]
        inner[last] = value


_YAML_TEXT = re.compile(r"""null|"(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|""", re.DOTALL)


def is_yaml_text(text: str) -> bool:
    """Return whether text is null, empty or quoted, and must therefore be parsed as YAML even if its key holds text."""
    return _YAML_TEXT.fullmatch(text) is not None


def read_text(path: str | Path) -> str:
    """Return the text of a file. Raises UserError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", do="check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", f"byte {error.start}", "save it as UTF-8") from error


def read_yaml(path: str | Path) -> ConfigTree:
    """Read a YAML file whose top level is a mapping. Raises UserError if the file is invalid or not a mapping."""
    name = str(path)
    tree = ConfigTree(name)
    text = read_text(path)
    try:
        values = _parse(text, tree, "", lambda key, node: SourceLocation(f"{name}:{node.start_mark.line + 1}", key))
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise UserError(f"{name} is not valid YAML: {_reason(error)}", where, "fix that line") from error
    if not isinstance(values, dict):
        raise UserError(f"{name} has no keys and values", name, "see launch/recipes for examples")
    tree.values = values
    return tree


_LocationOf = Callable[[str, yaml.Node], SourceLocation]


def _parse(text: str, tree: ConfigTree, key: str, location_of: _LocationOf) -> Any:
    node = yaml.compose(text, Loader=_Loader)
    return None if node is None else _value(node, tree, key, location_of)


def _value(node: yaml.Node, tree: ConfigTree, key: str, location_of: _LocationOf) -> Any:
    """Return the plain value of a node, and record the locations of the keys inside it."""
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
        tree.add_location(dot + name, location_of(dot + name, at))
        values[name] = _value(item, tree, dot + name, location_of)
    return list(values.values()) if isinstance(node, yaml.SequenceNode) else values


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.MarkedYAMLError(problem="a key must be one word", problem_mark=node.start_mark)
    return str(node.value)


def _reason(error: yaml.YAMLError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
