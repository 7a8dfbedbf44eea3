"""Serialization of the values that the tasks of `megagpt prepare` exchange.

A message is either bytes or JSON. Reading a message can create only values of the types listed in this module. It never
runs code, imports names or opens files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from megagpt.errors import MachineError, Problem, UserError
from megagpt.files import parse_json
from megagpt.prepare.chunks import Chunk, InputRange
from megagpt.prepare.encode import ChunkError
from megagpt.prepare.engines import EngineMismatch
from megagpt.prepare.input_warnings import InputError, InputLocation, InputWarnings, LocatedError, WarningCount
from megagpt.prepare.readers.decompress import Compression
from megagpt.prepare.readers.file_type import FileFormat
from megagpt.prepare.readers.inputs import InputFile
from megagpt.prepare.shards import ShardRecord
from megagpt.prepare.summary import PackingSummary, PartSummary, PrepareSummary

_RECORDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        InputFile,
        InputRange,
        Chunk,
        ShardRecord,
        InputWarnings,
        WarningCount,
        PackingSummary,
        PartSummary,
        PrepareSummary,
    )
}
_TUPLES: dict[str, type[Any]] = {kind.__name__: kind for kind in (InputLocation,)}
_ENUMS: dict[str, type[Enum]] = {kind.__name__: kind for kind in (FileFormat, Compression)}
_ERRORS: dict[str, type[UserError]] = {kind.__name__: kind for kind in (UserError, MachineError)}
_JSON, _BYTES = b"J", b"B"  # first byte of a message


class BadMessage(ValueError):
    """Error for a message that is not plain data of the listed types."""


def dumps(value: Any) -> bytes:
    """Serialize `value` to a message that `loads` can read. Raises TypeError if its type is not listed."""
    if isinstance(value, bytes):
        return _BYTES + value
    return _JSON + json.dumps(_plain(value), separators=(",", ":")).encode("utf-8", "surrogatepass")


def loads(message: bytes) -> Any:
    """Return the value of a message. Raises BadMessage if `dumps` could not have written the message."""
    kind, content = message[:1], message[1:]
    if kind == _BYTES:
        return content
    if kind != _JSON:
        raise BadMessage("neither JSON nor bytes")
    try:
        return _value(parse_json(content.decode("utf-8", "surrogatepass")))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise BadMessage(str(error)) from None


def register(kind: type[Any]) -> type[Any]:
    """Class decorator that adds a NamedTuple to the listed types."""
    _TUPLES[kind.__name__] = kind
    return kind


def _plain(value: Any) -> Any:
    """Convert a value to JSON-compatible data.

    Scalars are unchanged. Every other value becomes a list that starts with the name of its type.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return ["Path", str(value)]
    name = type(value).__name__
    if _TUPLES.get(name) is type(value) or _RECORDS.get(name) is type(value):
        parts = [getattr(value, one.name) for one in fields(value)] if is_dataclass(value) else list(value)
        return [name, *map(_plain, parts)]
    if _ENUMS.get(name) is type(value):
        return [name, value.value]
    if isinstance(value, UserError):
        error = "MachineError" if isinstance(value, MachineError) else "UserError"
        return [error, *([one.what, one.where, one.do] for one in value.problems)]
    if isinstance(value, ChunkError):
        return ["ChunkError", value.number, _plain(value.cause)]
    if isinstance(value, LocatedError) and name in _MAKERS:
        return [name, *map(_plain, value.args)]
    if isinstance(value, Mapping):
        return ["dict", *([_plain(key), _plain(one)] for key, one in value.items())]
    for kind in (list, tuple, set):
        if type(value) is kind:
            return [kind.__name__, *map(_plain, value)]
    raise TypeError(f"{name} cannot be sent to another task")


def _value(plain: Any) -> Any:
    if not isinstance(plain, list):
        if isinstance(plain, dict):
            raise BadMessage("a JSON object instead of a list")
        return plain
    name, *parts = plain
    if (make := _MAKERS.get(name)) is not None:
        return make(parts)
    if name in _ERRORS:
        problems = [Problem(*map(str, one)) for one in parts]
        return _ERRORS[name].from_problems(problems)
    if name in _ENUMS:
        return _ENUMS[name](*parts)
    if name in _RECORDS or name in _TUPLES:
        kind = _RECORDS.get(name) or _TUPLES[name]
        return kind(*map(_value, parts))
    raise BadMessage(f"type {str(name)[:40]!r} may not be exchanged between tasks")


_MAKERS: dict[str, Callable[[list[Any]], Any]] = {
    "Path": lambda parts: Path(*parts),
    "list": lambda parts: [_value(one) for one in parts],
    "tuple": lambda parts: tuple(_value(one) for one in parts),
    "set": lambda parts: {_value(one) for one in parts},
    "dict": lambda parts: {_value(key): _value(one) for key, one in parts},
    "ChunkError": lambda parts: ChunkError(int(parts[0]), _value(parts[1])),
    "InputError": lambda parts: InputError(_value(parts[0]), str(parts[1]), str(parts[2])),
    "EngineMismatch": lambda parts: EngineMismatch(_value(parts[0]), *map(str, parts[1:])),
}
