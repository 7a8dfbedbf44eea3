"""Words for values, types and keys, as error messages show them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

TableRow = tuple[str, Any, str]


def format_value(value: Any) -> str:
    """A value as one would write it in a file: 6.0e-4, true, null, "text"."""
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e6 and abs(value) < float("inf"):
        mantissa, exponent = f"{Decimal(repr(value)).normalize():E}".split("E")
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {format_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False, default=str)


def format_table(rows: Sequence[TableRow]) -> str:
    """Aligned lines of key, value, place."""
    shown = [(key, format_value(value), place) for key, value, place in rows]
    widths = [max(len(row[column]) for row in shown) for column in (0, 1)]
    return "\n".join(f"{key:<{widths[0]}}  {value:<{widths[1]}}   {place}" for key, value, place in shown)


def join_words(names: Iterable[str], last: str = "or") -> str:
    """`a, b or c`."""
    *first, end = names
    return f"{', '.join(first)} {last} {end}" if first else end


def describe_schema(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What a value must be, from its JSON schema: "a whole number, at least 1"."""
    if "$ref" in schema:
        inner = definitions[schema["$ref"].rpartition("/")[2]]
        return f"a section with {join_words(inner.get('required', inner['properties']), 'and')}"
    if "anyOf" in schema:
        return ", or ".join(describe_schema(option, definitions) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return join_words(dict.fromkeys(map(str, schema.get("enum", [schema.get("const")]))))
    if schema.get("type") == "array":
        count = schema.get("maxItems")
        return f"a list of {count} numbers" if count else "a list"
    names = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "object": "keys and values",
    }
    bounds = {
        "minimum": "at least {}", "exclusiveMinimum": "above {}", "exclusiveMaximum": "below {}",
        "maximum": "at most {}", "minLength": "not empty",
    }  # fmt: skip
    words = [text.format(_number(schema[key])) for key, text in bounds.items() if key in schema]
    return ", ".join([names.get(schema.get("type", ""), "null"), " and ".join(words)]).removesuffix(", ")


def _number(bound: float) -> str:
    return f"{bound:g}" if abs(bound) < 1e6 else "2^63" if bound == 2**63 else str(bound)
