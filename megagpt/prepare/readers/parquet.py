"""Reads the text column of a Parquet file, one row group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from megagpt.errors import UserError
from megagpt.prepare.readers.remote import is_remote, missing_package, open_remote

_BATCH_ROWS = 1024  # number of rows read at a time


def count_row_groups(path: str) -> int:
    """Return the number of row groups of a Parquet file. Raises UserError if the file is damaged."""
    return int(_open(path).num_row_groups)


class ParquetRow(NamedTuple):
    """Value of the text column in one row.

    Attributes:
        number: The number of the row in the file, counted from 1.
        has_value: False if the column is missing, or is null in this row.
        value: The value of the column, which need not be a string.
        invalid_utf8: The number of invalid UTF-8 sequences in the value. Each is replaced by U+FFFD.
    """

    number: int
    has_value: bool
    value: Any = None
    invalid_utf8: int = 0


def read_rows(path: str, first: int, end: int, key: tuple[str, ...]) -> Iterator[ParquetRow]:
    """Yield the rows of consecutive row groups.

    Args:
        path: A local path, or the address of a remote file.
        first: The first row group.
        end: The row group after the last one.
        key: The name of the column, followed by the names of nested fields, outermost first.

    Raises:
        UserError: The file is damaged.
    """
    file = _open(path)
    number = sum(file.metadata.row_group(group).num_rows for group in range(first))
    if not _has_column(file.schema_arrow, key):
        for row in range(sum(file.metadata.row_group(group).num_rows for group in range(first, end))):
            yield ParquetRow(number + row + 1, has_value=False)
        return
    for group in range(first, end):
        for value, invalid in _read_values(file, path, group, key):
            number += 1
            yield ParquetRow(number, value is not None, value, invalid)


def _read_values(file: Any, path: str, group: int, key: tuple[str, ...]) -> Iterator[tuple[Any, int]]:
    """Yield the values of a column in a row group, each with its number of invalid UTF-8 sequences."""
    import pyarrow
    from pyarrow import compute

    try:
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[".".join(key)]):
            column = batch.column(0)
            for name in key[1:]:
                column = compute.struct_field(column, name)
            try:
                yield from [(value, 0) for value in column.to_pylist()]
            except UnicodeDecodeError:
                yield from map(_decode, column.cast(pyarrow.large_binary()).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _decode(raw: bytes | None) -> tuple[str | None, int]:
    """Decode UTF-8. Returns the text, and the number of invalid sequences that were replaced by U+FFFD."""
    if raw is None:
        return None, 0
    text = raw.decode(errors="replace")
    return text, text.count("\ufffd") - raw.count("\ufffd".encode())


def _has_column(schema: Any, key: tuple[str, ...]) -> bool:
    """Return True if the schema has the column `key`, which may be nested in structs."""
    from pyarrow import types

    fields = list(schema)
    for name in key:
        kind = next((field.type for field in fields if field.name == name), None)
        if kind is None:
            return False
        fields = list(kind) if types.is_struct(kind) else []
    return True


def _open(path: str) -> Any:
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
    return UserError(f"cannot read the parquet file: {error}", path, "copy or create it again")
