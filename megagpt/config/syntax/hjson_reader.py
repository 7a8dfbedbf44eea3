"""Parse a DeepSpeed config, and record the source location of every key.

The grammar is Hjson, as in DeepSpeed itself, so comments (//, # and /* */) are allowed wherever DeepSpeed allows them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hjson.decoder import HjsonDecodeError, HjsonDecoder, JSONObject, make_scanner

from megagpt.config.syntax.locations import SourceLocation
from megagpt.config.syntax.yaml_reader import ConfigTree, read_text
from megagpt.errors import Problem, UserError


class _Pairs(list[tuple[str, Any, int]]):
    """Members of one object, each as (key, value, offset of the value in the text)."""


class _Decoder(HjsonDecoder):  # type: ignore[misc, unused-ignore]
    """Hjson decoder that records the offset in the text at which each value begins."""

    def __init__(self) -> None:
        super().__init__()
        self.parse_object = self._object
        self.scan_once, self.scan_object_once = make_scanner(self)

    def _object(
        self,
        state: Any,
        encoding: Any,
        strict: Any,
        scan: Any,
        hook: Any,
        pairs_hook: Any,
        memo: Any,
        bare: bool = False,
    ) -> Any:
        starts: list[int] = []

        def scan_value(text: str, index: int) -> Any:
            starts.append(index)
            return scan(text, index)

        def located(pairs: list[tuple[str, Any]]) -> _Pairs:
            return _Pairs((key, value, start) for (key, value), start in zip(pairs, starts, strict=True))

        return JSONObject(state, encoding, strict, scan_value, None, located, memo, bare)


def read_hjson(path: str | Path) -> ConfigTree:
    """Read a DeepSpeed config. Raises UserError if the file does not contain a single object."""
    name = str(path)
    text = read_text(path)
    try:
        pairs = _Decoder().decode(text)
    except HjsonDecodeError as error:
        where = f"{name}:{error.lineno}"
        raise UserError(f"{name} is not valid JSON: {error.msg}", where, "fix that line") from error
    except IndexError as error:  # Hjson raises this for a comment that is never closed.
        raise UserError(f"{name} ends inside a comment", name, "close it with */") from error
    if not isinstance(pairs, _Pairs):
        raise UserError(f"{name} has no keys and values", name, "see ds_configs for examples")
    tree = ConfigTree(name)
    tree.values = _values(pairs, text, tree, "")
    return tree


def _values(pairs: _Pairs, text: str, tree: ConfigTree, section: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value, start in pairs:
        key = f"{section}.{name}" if section else name
        at = f"{tree.name}:{text.count(chr(10), 0, start) + 1}"
        if not name or "." in name:
            tree.problems.append(Problem(f'"{name}" is not a key', at, "write keys inside their section"))
            continue
        tree.add_location(key, SourceLocation(at, key))
        values[name] = _plain(value, text, tree, key)
    return values


def _plain(value: Any, text: str, tree: ConfigTree, key: str) -> Any:
    if isinstance(value, _Pairs):
        return _values(value, text, tree, key)
    if isinstance(value, list):
        return [_plain(item, text, tree, f"{key}.{index}") for index, item in enumerate(value)]
    return value
