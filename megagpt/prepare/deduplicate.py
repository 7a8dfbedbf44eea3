"""Finds documents that are exact copies of an earlier document by comparing hashes, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megagpt.prepare.merge_shards import document_digests
from megagpt.prepare.shards import ShardRecord
from megagpt.prepare.workdir import create_memmap

# The two halves of a document's hash, and the index of the document in the whole input.
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<u8")])
_ENTRIES_PER_FILE = 1 << 20  # number of entries sorted at a time, which takes about 60 MB
_MAX_FILES = 256


def mark_first_copies(folder: Path, records: Sequence[ShardRecord]) -> Path:
    """Mark the first document with each text as a document to keep.

    The hashes are distributed to files by their leading bits. Copies of a document are therefore in the same file, and
    each file can be sorted separately.

    Args:
        folder: The folder of the shards, in which the files are created.
        records: The records of all shards.

    Returns:
        The path of a file with one bool per document, in input order. Documents to keep are True.
    """
    count = sum(record.documents for record in records)
    path = folder / "keep"
    keep = create_memmap(path, np.bool_, count)
    keep[:] = True
    file_count = min(_MAX_FILES, -(-count // _ENTRIES_PER_FILE))
    paths = [folder / f"hashes.{number}" for number in range(file_count)]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for first, digests in document_digests(folder, records):
            entries = np.empty(len(digests), _ENTRY)
            entries["high"], entries["low"] = digests.T
            entries["document"] = first + np.arange(len(digests))
            file_numbers = (entries["high"] >> np.uint64(48)) * np.uint64(file_count) >> np.uint64(16)
            for number in np.unique(file_numbers).tolist():
                files[number].write(entries[file_numbers == number].tobytes())
    for hashes in paths:
        entries = np.fromfile(hashes, _ENTRY)
        entries = entries[np.lexsort((entries["document"], entries["low"], entries["high"]))]
        is_copy = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
        keep[entries["document"][1:][is_copy]] = False
        hashes.unlink()
    keep.flush()
    return path
