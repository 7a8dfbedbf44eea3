"""What the user names as input, as a list of files: paths, folders, patterns, manifests, standard input, stores."""

from __future__ import annotations

import glob
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from megagpt.data.manifest import ManifestReader
from megagpt.data.opening import Compression
from megagpt.data.remote import is_http, is_remote, open_filesystem, supports_ranges
from megagpt.data.sniffing import SUPPORTED_SUFFIXES, FileFormat, detect_format, has_supported_suffix
from megagpt.errors import UserError
from megagpt.files import ChecksummedFile

DEFAULT_CORPUS = "default"  # the word that stands for the default corpus among the inputs
STANDARD_INPUT = "-"
_MANIFEST = "@"
_PATTERN = frozenset("*?[")
_CORRECT = "correct the path; the word `default` stands for the default corpus"


@dataclass(frozen=True)
class InputFile:
    """One file of the input.

    `size` is in bytes, as it lies there; `state` changes when the file does. `corpus` names the corpus that its
    documents go to, where a manifest asks for several, and `weight` is that corpus's in a blend, if it is given there.
    A file that is not `in_parts` can be read from its beginning only.
    """

    path: str
    kind: FileFormat
    size: int
    state: str
    compression: Compression = Compression.NONE
    corpus: str = ""
    weight: float | None = None
    in_parts: bool = True


def find_input_files(inputs: Sequence[str], spool: Path) -> list[InputFile]:
    """The files that the inputs stand for, in the order given; those of a folder or pattern in the order of names.

    An input is a file, a folder, a pattern (`data/*.jsonl.zst`), `@FILE` (a manifest, see manifest.py), `-` for
    standard input, or any of these on a store such as `s3://`. What comes through a pipe is copied to files beside
    `spool`. No input, or the word `default`, is the default corpus. Raises UserError for what is missing or no text.
    """
    if not inputs or list(inputs) == [DEFAULT_CORPUS]:
        return [InputFile(DEFAULT_CORPUS, FileFormat.DEFAULT_CORPUS, 0, "")]
    if DEFAULT_CORPUS in inputs:
        do = f"leave out one of them, or write ./{DEFAULT_CORPUS} if it is a file"
        raise UserError(f"`{DEFAULT_CORPUS}` stands for the default corpus and cannot be mixed with files", "INPUT", do)
    lines, pipes = ManifestReader(), _Pipes(spool)
    sources = [source for given in inputs for source in _sources(given, pipes, lines)]
    weights = lines.weights({source.corpus for source in sources})
    return [replace(source, weight=weights.get(source.corpus)) for source in sources]


def _sources(given: str, pipes: _Pipes, lines: ManifestReader) -> Iterator[InputFile]:
    if given == STANDARD_INPUT:
        yield pipes.copied(sys.stdin.buffer)
    elif given.startswith(_MANIFEST) and not os.path.exists(given):
        yield from _manifest(Path(given[1:]), pipes, lines)
    elif is_remote(given):
        yield from _remote(given)
    else:
        yield from _local(given, pipes)


def _local(given: str, pipes: _Pipes, corpus: str = "") -> Iterator[InputFile]:
    path = Path(given)
    if path.is_dir():
        found = sorted(_walk(path))
        if not found:
            do = f"put {SUPPORTED_SUFFIXES} files into it, or name another folder"
            raise UserError("the folder holds no text files", given, do)
    elif path.exists():
        found = [path]
    else:
        found = [Path(name) for name in sorted(glob.glob(given, recursive=True)) if not os.path.isdir(name)]
        if not found and _PATTERN & set(given):
            raise UserError("no file is of this pattern", given, "correct it, and mind the shell's quotes")
        if not found:
            raise UserError("there is no such file or folder", given, _CORRECT)
    for file in found:
        status = file.stat()
        if stat.S_ISFIFO(status.st_mode):  # as of <(command) in a shell: what is looked at would be gone
            with file.open("rb") as pipe:
                yield pipes.copied(pipe, corpus)
            continue
        if not stat.S_ISREG(status.st_mode):
            raise UserError("this is no file", str(file), "give files, folders, patterns, or a pipe")
        kind, compression = detect_format(str(file))
        yield InputFile(str(file), kind, status.st_size, str(status.st_mtime_ns), compression, corpus)


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and has_supported_suffix(name):
                yield Path(parent, name)


def _remote(given: str, corpus: str = "") -> Iterator[InputFile]:
    """The files that an address stands for, as fsspec lists them."""
    system, inner = open_filesystem(given)
    try:
        found = [(name, system.info(name), _in_parts(system, name)) for name in _names(system, inner)]
    except Exception as error:  # of the store's own package
        do = "check the address, that it can be reached, and that you may read it"
        raise UserError(f"cannot look into this store: {type(error).__name__}: {error}", given, do) from None
    if not found:
        raise UserError(
            "no text file is there", given, f"correct the address; {SUPPORTED_SUFFIXES} files are taken from a folder"
        )
    for name, facts, in_parts in found:
        path = system.unstrip_protocol(name)
        kind, compression = detect_format(path)
        # What fsspec takes for a web file's state is its address.
        state = str([system.ukey(name), facts.get("ETag"), facts.get("Last-Modified")])
        yield InputFile(path, kind, facts["size"] or 0, state, compression, corpus, in_parts=in_parts)


def _in_parts(system: Any, name: str) -> bool:
    return not is_http(system) or supports_ranges(system.unstrip_protocol(name))


def _names(system: Any, inner: str) -> list[str]:
    if _PATTERN - (set("?") if is_http(system) else set()) & set(inner):
        return sorted(system.glob(inner))
    if has_supported_suffix(inner) or not system.isdir(inner):  # a web server may take a file for a folder
        return [inner] if system.exists(inner) else []
    return sorted(name for name in system.find(inner) if has_supported_suffix(name))


def _manifest(path: Path, pipes: _Pipes, lines: ManifestReader) -> Iterator[InputFile]:
    for line in lines.read(path):
        try:
            if is_remote(line.name):
                yield from _remote(line.name, line.corpus)
            else:
                yield from _local(str(path.parent / line.name), pipes, line.corpus)
        except UserError as error:
            problem = error.problems[0]
            raise UserError(problem.what, f"{problem.where}\n{line.where}", problem.do) from None


class _Pipes:
    """Copies what can be read only once: it can then be looked at, cut into pieces, and read twice."""

    def __init__(self, spool: Path) -> None:
        self._spool, self._count = spool, 0

    def copied(self, pipe: IO[bytes], corpus: str = "") -> InputFile:
        """The next one's copy."""
        path = self._spool.with_name(self._spool.name + (f".{self._count}" if self._count else ""))
        self._count += 1
        with ChecksummedFile(path) as file:
            size = 0
            while block := pipe.read(1 << 20):
                file.write(block)
                size += len(block)
        kind, compression = detect_format(str(path))
        return InputFile(str(path), kind, size, str(file.crc32), compression, corpus)
