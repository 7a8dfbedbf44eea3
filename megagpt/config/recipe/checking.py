"""Validate the values of a recipe and report every problem with its source location."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ValidationError

from megagpt.config.recipe.presets import PRESETS
from megagpt.config.recipe.rules import RULES, Rule
from megagpt.config.recipe.sections import Recipe, Source
from megagpt.config.recipe.synonyms import key_of_synonym, remedy_for_synonym
from megagpt.config.syntax.formatting import (
    TableRow,
    describe_schema,
    format_table,
    format_value,
    join_words,
    takes_text,
)
from megagpt.config.syntax.paths import expand_path
from megagpt.config.syntax.yaml_reader import ConfigTree, is_yaml_text
from megagpt.errors import Problem, closest_match


def check_values(tree: ConfigTree) -> tuple[Recipe | None, list[Problem]]:
    """Validate all values of a recipe.

    Args:
        tree: the values as given, with their source locations.

    Returns:
        The recipe (None if the values are invalid), and all problems.
    """
    recipe = None
    errors: Sequence[Mapping[str, Any]] = ()
    try:
        recipe = Recipe.model_validate(tree.values)
    except ValidationError as error:
        errors = [e for e in error.errors() if e["type"] != "default_factory_not_called"]
    problems = _problems_of_single_keys(errors, tree) if errors else []
    broken = {_key(error) for error in errors}
    for rule in RULES:
        problem = apply_rule(rule, tree, broken)
        if problem is not None:
            problems.append(problem)
    return recipe, problems


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a recipe, including the names of sections.

    Args:
        model: the section whose keys are listed.
        prefix: text to put before each name, such as "optimizer.".
    """
    for name, info in model.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from known_keys(info.annotation, f"{prefix}{name}.")


# A key of another section is suggested only if its name is at least this similar (see `closest_match`).
_ELSEWHERE = 0.85
# The value of these keys is either a single prefix, as text, or a list of prefixes.
_PREFIX_KEYS = frozenset({"data.train", "data.validation"})


def is_literal(key: str, text: str) -> bool:
    """Return whether the value of an override is used literally instead of being parsed as YAML.

    This is the case for keys that hold text, such as a path, a name or a prompt.

    Args:
        key: dotted key of a recipe.
        text: the value as the user wrote it.
    """
    if is_yaml_text(text):
        return False
    return key in _text_keys() or (key in _PREFIX_KEYS and not text.startswith(("[", "{")))


@lru_cache(maxsize=1)
def _text_keys() -> frozenset[str]:
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]

    def walk(properties: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name, node in properties.items():
            if "$ref" in node:
                inner = definitions[node["$ref"].rpartition("/")[2]].get("properties", {})
                yield from walk(inner, f"{prefix}{name}.")
            elif takes_text(node):
                yield prefix + name

    return frozenset(walk(schema["properties"], ""))


def expand_paths(tree: ConfigTree) -> list[Problem]:
    """Expand `~` and environment variables in the paths of a recipe, and return the problems that occur.

    Args:
        tree: the values as given, which are modified in place.
    """
    problems: list[Problem] = []

    def expanded(value: Any, key: str) -> Any:
        if isinstance(value, list):
            return [expanded(item, f"{key}.{index}") for index, item in enumerate(value)]
        if isinstance(value, dict) and "path" in value:
            return {**value, "path": expanded(value["path"], f"{key}.path")}
        if not isinstance(value, str):
            return value
        try:
            return expand_path(value)
        except ValueError as error:
            do = "set it where training starts, or write the path out"
            problems.append(Problem(f"{key} cannot be expanded: {error}", tree.where(key), do))
            return value

    for key in _PATH_KEYS:
        section, _, name = key.rpartition(".")
        values = tree.values.get(section) if section else tree.values
        if isinstance(values, dict) and name in values:
            values[name] = expanded(values[name], key)
    return problems


_PATH_KEYS = ("run_dir", "init_from", "data.tokenizer", *sorted(_PREFIX_KEYS))


def _key(error: Mapping[str, Any]) -> str:
    return ".".join(map(str, error["loc"]))


def _problems_of_single_keys(errors: Sequence[Mapping[str, Any]], tree: ConfigTree) -> list[Problem]:
    """Return the problems that involve a single key, beginning with unknown keys.

    A missing key is not reported if an unknown key is probably a misspelling of it.
    """
    problems = []
    meant = set()
    for error in errors:
        if error["type"] == "extra_forbidden":
            problem, suggestion = _unknown(_key(error), tree)
            problems.append(problem)
            meant.add(suggestion)
    schema = Recipe.model_json_schema()
    for error in errors:
        key, kind = _key(error), error["type"]
        if kind == "extra_forbidden" or (kind == "missing" and (key in meant or _preset_is_unknown(key, tree))):
            continue
        section_of_list = isinstance(error["loc"][-1], int) and kind == "missing"
        owner = key.rpartition(".")[0] if section_of_list else key
        wanted, help_text = _wanted(schema, owner.split("."))
        missing = kind == "missing" and not section_of_list
        what = f"{owner} is missing" if missing else f"{owner} cannot be {format_value(error['input'])}"
        do = f"give {wanted}: {help_text}" if help_text else f"give {wanted}"
        problems.append(Problem(what, tree.where(owner), do))
    return problems


def _preset_is_unknown(key: str, tree: ConfigTree) -> bool:
    try:
        return key.startswith("model.") and tree.value("model.preset") not in PRESETS
    except KeyError:
        return False


def _unknown(key: str, tree: ConfigTree) -> tuple[Problem, str | None]:
    """Return the problem of a key that does not exist, and the key that was probably meant."""
    section, _, name = key.rpartition(".")
    keys = list(known_keys()) + [f"{section}.{k}" for k in Source.model_fields if section.startswith("data.train.")]
    same_name = [k for k in keys if k.rpartition(".")[2] == name]
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    everywhere = {k.rpartition(".")[2]: k for k in keys}
    what = f"unknown key {key}"
    if same_name:
        sections = join_words(other.rpartition(".")[0] or "the top level" for other in same_name)
        what = f"misplaced key {key}: {name} belongs to {sections}"
        return Problem(what, tree.where(key), f"move it to {join_words(same_name)}"), same_name[0]
    remedy = remedy_for_synonym(name)
    if remedy:
        return Problem(what, tree.where(key), remedy), key_of_synonym(name)
    near = closest_match(name, siblings) or closest_match(name, everywhere, cutoff=_ELSEWHERE)
    if near:
        meant = siblings.get(near) or everywhere[near]
        return Problem(what, tree.where(key), f"write {meant}{tree.key_inside(key).removeprefix(key)}"), meant
    do = f"remove it; {section or 'a recipe'} has {join_words(siblings, 'and')}"
    return Problem(what, tree.where(key), do), None


def _wanted(schema: Mapping[str, Any], path: Sequence[str]) -> tuple[str, str]:
    """Return a description of the values that a key allows, and the key's help text."""
    definitions: Mapping[str, Any] = schema["$defs"]
    node: Mapping[str, Any] = schema
    for part in path:
        node = definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        if "properties" in node:
            node = node["properties"][part]
        else:
            node = node["prefixItems"][int(part)] if "prefixItems" in node else node["items"]
    help_text = "" if "$ref" in node else node.get("description", "")
    return describe_schema(node, definitions), help_text


def apply_rule(rule: Rule, tree: ConfigTree, broken: set[str]) -> Problem | None:
    """Check one rule between keys.

    Args:
        rule: the rule.
        tree: the values as given.
        broken: keys whose values are malformed.

    Returns:
        The problem, or None if the rule holds or if a value that it needs is missing or malformed.
    """
    function, keys = rule
    try:
        values = [_lookup(key, tree, broken) for key in keys]
    except KeyError:
        return None
    violation = function(*values)
    if violation is None:
        return None
    what, do = violation
    rows = [
        (key, value, _origin(key, tree))
        for key, value in zip(keys, values, strict=True)
        if value not in (None, ()) or key in tree.locations
    ]
    return Problem(what, _where(rows, keys[0], tree), do)


def _where(rows: Sequence[TableRow], key: str, tree: ConfigTree) -> str:
    if len(rows) > 1:
        return format_table(rows)
    return tree.where(rows[0][0] if rows else key.rpartition(".")[0])


def _origin(key: str, tree: ConfigTree) -> str:
    """Return the origin of a value: a source location, the preset, or "default"."""
    if key in tree.locations:
        return tree.locations[key].at
    name = key.rpartition(".")[2]
    if key.startswith("model.") and name in PRESETS.get(_preset(tree), {}):
        return f"preset {_preset(tree)}"
    return "default"


def _preset(tree: ConfigTree) -> str:
    try:
        return str(tree.value("model.preset"))
    except KeyError:
        return ""


def _lookup(key: str, tree: ConfigTree, broken: set[str]) -> Any:
    """Return the value of a key as given, or else the preset's value, or else the default.

    Raises KeyError if there is no value, or if the given value is malformed.
    """
    if any(key == b or key.startswith(f"{b}.") or b.startswith(f"{key}.") for b in broken):
        raise KeyError(key)
    try:
        return tree.value(key)
    except KeyError:
        section, _, name = key.rpartition(".")
        if key.startswith("model.") and name in PRESETS.get(_preset(tree), {}):
            return PRESETS[_preset(tree)][name]
        field = Recipe.model_fields[section].annotation.model_fields[name]  # type: ignore[union-attr]
        if field.is_required() or field.default_factory is not None:
            raise
        return field.default
