"""Texts out of a column of a parquet file, a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megagpt.data.opening import file_system, is_remote, missing
from megagpt.errors import UserError

_ROWS = 1024  # read at a time


def row_groups(path: str) -> int:
    """How many row groups the file has. Raises UserError for a file that is damaged."""
    return int(_file(path).num_row_groups)


def rows(path: str, first: int, end: int, key: tuple[str, ...]) -> Iterator[tuple[int, bool, Any]]:
    """Rows of the row groups `first` to `end`: number in the file from 1, whether the column is there, its value."""
    file = _file(path)
    number = sum(file.metadata.row_group(group).num_rows for group in range(first))
    if not _has(file.schema_arrow, key):
        for row in range(sum(file.metadata.row_group(group).num_rows for group in range(first, end))):
            yield number + row + 1, False, None
        return
    for group in range(first, end):
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[".".join(key)]):
            for value in batch.column(0).to_pylist():
                number += 1
                for name in key[1:]:
                    value = None if value is None else value[name]
                yield number, value is not None, value


def _has(schema: Any, key: tuple[str, ...]) -> bool:
    """Whether the schema has the column that the key leads to, through structures."""
    fields = list(schema)
    for name in key:
        kind = next((field.type for field in fields if field.name == name), None)
        if kind is None:
            return False
        fields = [kind.field(number) for number in range(kind.num_fields)]
    return True


def _file(path: str) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing("pyarrow", "parquet", path) from None
    try:
        if is_remote(path):
            system, path_there = file_system(path)
            return parquet.ParquetFile(system.open(path_there, "rb"))
        return parquet.ParquetFile(path, memory_map=False)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"the parquet file cannot be read: {error}", path, "copy or make it again") from None
