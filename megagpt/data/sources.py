"""What the user names as input, as a list of files: files, folders, and the default corpus."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from megagpt.errors import UserError

DEFAULT = "default"  # the word that stands for the default corpus among the inputs


class Kind(Enum):
    """How a file holds documents."""

    TEXT = "text"  # one document
    LINES = "lines"  # a JSON object a line
    DEFAULT = "default"  # the default corpus, which is no file


SUFFIXES = {".txt": Kind.TEXT, ".md": Kind.TEXT, ".jsonl": Kind.LINES}


@dataclass(frozen=True)
class Source:
    """One file of the input. `state` (nanoseconds of its last change) tells a changed file; `size` is in bytes."""

    path: str
    kind: Kind
    size: int
    state: int


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """The files that the inputs stand for, in the order given; a folder's files in the order of their names.

    No input, or the word `default`, is the default corpus. Raises UserError for what is missing or of no known kind.
    """
    if not inputs or list(inputs) == [DEFAULT]:
        return [Source(DEFAULT, Kind.DEFAULT, 0, 0)]
    if DEFAULT in inputs:
        do = f"leave out one of them, or write ./{DEFAULT} if it is a file"
        raise UserError(f"`{DEFAULT}` stands for the default corpus and cannot be mixed with files", "INPUT", do)
    return [source for path in inputs for source in _sources(Path(path))]


def _sources(path: Path) -> Iterator[Source]:
    if path.is_dir():
        found = sorted(_walk(path))
        if not found:
            do = f"put {', '.join(SUFFIXES)} files into it, or name another folder"
            raise UserError("the folder holds no text files", str(path), do)
        yield from map(_source, found)
    elif not path.exists():
        do = "correct the path; the word `default` stands for the default corpus"
        raise UserError("there is no such file or folder", str(path), do)
    elif path.suffix.lower() not in SUFFIXES:
        do = f"give {', '.join(SUFFIXES)} files, or rename this one if it is plain text"
        raise UserError(f"cannot tell what kind of file this is ({path.suffix or 'no ending'})", str(path), do)
    else:
        yield _source(path)


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(parent, name)


def _source(path: Path) -> Source:
    status = path.stat()
    return Source(str(path), SUFFIXES[path.suffix.lower()], status.st_size, status.st_mtime_ns)
