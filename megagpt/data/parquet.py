"""Texts out of a column of a parquet file, a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from megagpt.data.remote import is_remote, missing_package, open_remote
from megagpt.errors import UserError

_ROWS = 1024  # read at a time


def count_row_groups(path: str) -> int:
    """How many row groups the file has. Raises UserError for a file that is damaged."""
    return int(_file(path).num_row_groups)


class ParquetRow(NamedTuple):
    """A row by its number in the file, from 1: whether the column is `there`, and its value; of a text also how many
    places of it were no UTF-8, and are U+FFFD now.
    """

    number: int
    there: bool
    value: Any = None
    broken: int = 0


def read_rows(path: str, first: int, end: int, key: tuple[str, ...]) -> Iterator[ParquetRow]:
    """The rows of the row groups `first` to `end`. Raises UserError for a file that is damaged."""
    file = _file(path)
    number = sum(file.metadata.row_group(group).num_rows for group in range(first))
    if not _has(file.schema_arrow, key):
        for row in range(sum(file.metadata.row_group(group).num_rows for group in range(first, end))):
            yield ParquetRow(number + row + 1, False)
        return
    for group in range(first, end):
        for value, broken in _values(file, path, group, key):
            number += 1
            yield ParquetRow(number, value is not None, value, broken)


def _values(file: Any, path: str, group: int, key: tuple[str, ...]) -> Iterator[tuple[Any, int]]:
    """The column's values in a row group, and how many places of each are no UTF-8."""
    import pyarrow
    from pyarrow import compute

    try:
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[".".join(key)]):
            column = batch.column(0)
            for name in key[1:]:
                column = compute.struct_field(column, name)
            try:
                yield from [(value, 0) for value in column.to_pylist()]
            except UnicodeDecodeError:
                yield from map(_replaced, column.cast(pyarrow.large_binary()).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _replaced(raw: bytes | None) -> tuple[str | None, int]:
    """The text of these bytes, with U+FFFD in place of what is no UTF-8, and how often."""
    if raw is None:
        return None, 0
    text = raw.decode(errors="replace")
    return text, text.count("\ufffd") - raw.count("\ufffd".encode())


def _has(schema: Any, key: tuple[str, ...]) -> bool:
    """Whether the schema has the column that the key leads to, through structures."""
    from pyarrow import types

    fields = list(schema)
    for name in key:
        kind = next((field.type for field in fields if field.name == name), None)
        if kind is None:
            return False
        fields = list(kind) if types.is_struct(kind) else []
    return True


def _file(path: str) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing_package("pyarrow", "parquet", path) from None
    try:
        if is_remote(path):
            return parquet.ParquetFile(open_remote(path))
        return parquet.ParquetFile(path, memory_map=False)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(f"the parquet file cannot be read: {error}", path, "copy or make it again")
