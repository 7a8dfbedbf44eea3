"""All that is wrong with the values of a recipe, as problems for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from megagpt.errors import Problem, closest_match
from megagpt.recipe.presets import PRESETS
from megagpt.recipe.reading import ConfigTree
from megagpt.recipe.rules import RULES, Rule
from megagpt.recipe.sections import Recipe, Source
from megagpt.recipe.wording import TableRow, describe_schema, format_table, format_value, join_words


def check(tree: ConfigTree) -> tuple[Recipe | None, list[Problem]]:
    """The recipe that the values make, if they do, and every problem with them."""
    errors: Sequence[Mapping[str, Any]] = ()
    recipe = None
    try:
        recipe = Recipe.model_validate(tree.values)
    except ValidationError as error:
        errors = [e for e in error.errors() if e["type"] != "default_factory_not_called"]
    found = _shape_problems(errors, tree) if errors else []
    broken = {_key(error) for error in errors}
    found += [p for p in (apply_rule(rule, tree, broken) for rule in RULES) if p]
    return recipe, found


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a recipe, sections included."""
    for name, info in model.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from known_keys(info.annotation, f"{prefix}{name}.")


def _key(error: Mapping[str, Any]) -> str:
    return ".".join(map(str, error["loc"]))


def _shape_problems(errors: Sequence[Mapping[str, Any]], tree: ConfigTree) -> list[Problem]:
    """Unknown keys first: a missing key that one of them was meant for is not reported again."""
    problems, meant = [], set()
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
    """The problem of a key that does not exist, and the key that was probably meant."""
    section, _, name = key.rpartition(".")
    keys = list(known_keys()) + [f"{section}.{k}" for k in Source.model_fields if section.startswith("data.train.")]
    homes = [k for k in keys if k.rpartition(".")[2] == name]
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    everywhere = {k.rpartition(".")[2]: k for k in keys}
    if homes:
        where_to = join_words(home.rpartition(".")[0] or "the top level" for home in homes)
        what = f"misplaced key {key}: {name} belongs to {where_to}"
        return Problem(what, tree.where(key), f"move it to {join_words(homes)}"), homes[0]
    for names in (siblings, everywhere):
        near = closest_match(name, names)
        if near:
            return Problem(f"unknown key {key}", tree.where(key), f"write {names[near]}"), names[near]
    do = f"take it away; {section or 'a recipe'} has {join_words(siblings, 'and')}"
    return Problem(f"unknown key {key}", tree.where(key), do), None


def _wanted(schema: Mapping[str, Any], path: Sequence[str]) -> tuple[str, str]:
    """What a key must be, and its help text."""
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
    """Ask one rule, unless a value that it needs is missing or malformed."""
    function, keys = rule
    try:
        values = [_lookup(key, tree, broken) for key in keys]
    except KeyError:
        return None
    finding = function(*values)
    if finding is None:
        return None
    rows = [
        (key, value, _origin(key, tree))
        for key, value in zip(keys, values, strict=True)
        if value not in (None, ()) or key in tree.locations
    ]
    return Problem(finding[0], _where(rows, keys[0], tree), finding[1])


def _where(rows: Sequence[TableRow], key: str, tree: ConfigTree) -> str:
    if len(rows) > 1:
        return format_table(rows)
    return tree.where(rows[0][0] if rows else key.rpartition(".")[0])


def _origin(key: str, tree: ConfigTree) -> str:
    """Where a value comes from: a place, the preset, or the default."""
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
    """The value of a key: given, of the preset, or the default. KeyError if it has none that is sound."""
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
