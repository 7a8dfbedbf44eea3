"""Format values, types and lists of keys for error messages and help texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

TableRow = tuple[str, Any, str]
"""Key, value and location."""

_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "object": "keys and values",
}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "exclusiveMaximum": "below {}",
    "maximum": "at most {}",
    "minLength": "not empty",
}


def format_value(value: Any) -> str:
    """Format a value as it would be written in a YAML file, such as 6.0e-4, true, null or "text"."""
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e6 and abs(value) < float("inf"):
        mantissa, exponent = f"{Decimal(repr(value)).normalize():E}".split("E")
        if "." not in mantissa:
            mantissa += ".0"
        return f"{mantissa}e{int(exponent)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {format_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False, default=str)


def format_table(rows: Sequence[TableRow]) -> str:
    """Format rows of key, value and location as lines with aligned columns."""
    formatted = [(key, format_value(value), location) for key, value, location in rows]
    key_width = max(len(key) for key, _, _ in formatted)
    value_width = max(len(value) for _, value, _ in formatted)
    return "\n".join(f"{key:<{key_width}}  {value:<{value_width}}   {location}" for key, value, location in formatted)


def join_words(items: Iterable[str], conjunction: str = "or") -> str:
    """Join items as in "a, b or c"."""
    *first, last = items
    return f"{', '.join(first)} {conjunction} {last}" if first else last


def describe_schema(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Describe the values that a JSON schema allows, as in "a whole number, at least 1".

    Args:
        schema: the JSON schema of one value.
        definitions: the schemas that a `$ref` can refer to, by name.
    """
    if "$ref" in schema:
        section = definitions[schema["$ref"].rpartition("/")[2]]
        return f"a section with {join_words(section.get('required', section['properties']), 'and')}"
    if "anyOf" in schema:
        return ", or ".join(describe_schema(option, definitions) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return join_words(dict.fromkeys(map(str, schema.get("enum", [schema.get("const")]))))
    if schema.get("type") == "array":
        count = schema.get("maxItems")
        return f"a list of {count} numbers" if count else "a list"
    type_name = _TYPES.get(schema.get("type", ""), "null")
    bounds = [text.format(_format_bound(schema[key])) for key, text in _BOUNDS.items() if key in schema]
    return f"{type_name}, {' and '.join(bounds)}" if bounds else type_name


def takes_text(schema: Mapping[str, Any]) -> bool:
    """Return whether a JSON schema allows arbitrary text, and no other value except null."""
    options = schema.get("anyOf", [schema])
    kinds = [option.get("type") for option in options if "enum" not in option and "const" not in option]
    return len(kinds) == len(options) and "string" in kinds and set(kinds) <= {"string", "null"}


def _format_bound(bound: float) -> str:
    if abs(bound) < 1e6:
        return f"{bound:g}"
    return "2^63" if bound == 2**63 else str(bound)
