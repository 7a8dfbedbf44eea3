"""Which documents are exact copies of an earlier one, found by their hashes in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megagpt.data.shards import ShardRecord
from megagpt.prepare.joining import document_digests
from megagpt.prepare.workplace import create_memmap

_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<u8")])
_TOGETHER = 1 << 20  # entries sorted at a time: some 60 MB
_MOST_FILES = 256


def mark_first_copies(folder: Path, records: Sequence[ShardRecord]) -> Path:
    """Which of all documents, in the order of the input, are the first of their text: a file of bools in `folder`.

    The hashes are dealt to files by their leading bits, so that copies meet in one file, which is sorted by itself.
    """
    count = sum(record.documents for record in records)
    path = folder / "keep"
    keep = create_memmap(path, np.bool_, count)
    keep[:] = True
    files = min(_MOST_FILES, -(-count // _TOGETHER))
    paths = [folder / f"hashes.{number}" for number in range(files)]
    with ExitStack() as stack:
        opened = [stack.enter_context(hashes.open("wb")) for hashes in paths]
        for first, digest in document_digests(folder, records):
            entries = np.empty(len(digest), _ENTRY)
            entries["high"], entries["low"] = digest.T
            entries["document"] = first + np.arange(len(digest))
            file = (entries["high"] >> np.uint64(48)) * np.uint64(files) >> np.uint64(16)
            for number in np.unique(file).tolist():
                opened[number].write(entries[file == number].tobytes())
    for hashes in paths:
        entries = np.fromfile(hashes, _ENTRY)
        entries = entries[np.lexsort((entries["document"], entries["low"], entries["high"]))]
        copies = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
        keep[entries["document"][1:][copies]] = False
        hashes.unlink()
    keep.flush()
    return path
