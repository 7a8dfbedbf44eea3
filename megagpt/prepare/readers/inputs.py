"""Finds the input files in paths, folders, patterns, manifests, standard input and remote stores."""

from __future__ import annotations

import glob
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from megagpt.errors import UserError
from megagpt.files import ChecksummedFile
from megagpt.prepare.readers.decompress import Compression
from megagpt.prepare.readers.file_type import SUPPORTED_SUFFIXES, FileFormat, detect_format, has_supported_suffix
from megagpt.prepare.readers.manifest import ManifestReader
from megagpt.prepare.readers.remote import is_http, is_remote, open_filesystem, supports_ranges

DEFAULT_CORPUS = "default"  # name of the input that stands for the default corpus
STANDARD_INPUT = "-"
_MANIFEST = "@"
_PATTERN_CHARACTERS = frozenset("*?[")
_CORRECT_PATH = "correct the path, or use `default` for the default corpus"


@dataclass(frozen=True)
class InputFile:
    """One file of the input.

    Attributes:
        path: A local path, or the address of a remote file.
        format: The format of the file.
        size: The size of the file in bytes, before decompression.
        fingerprint: A text that changes if the content of the file changes.
        compression: The compression of the file.
        corpus: The name of the corpus to which the documents belong, if a manifest specifies it. Otherwise "".
        weight: The weight of that corpus in a blend, if a manifest specifies it.
        supports_ranges: False if the file can be read only from its beginning.
    """

    path: str
    format: FileFormat
    size: int
    fingerprint: str
    compression: Compression = Compression.NONE
    corpus: str = ""
    weight: float | None = None
    supports_ranges: bool = True


def find_input_files(inputs: Sequence[str], spool: Path) -> list[InputFile]:
    """Find the files of the inputs, in the given order. The files of a folder or pattern are sorted by name.

    Args:
        inputs: The inputs. Each is a file, a folder, a pattern (`data/*.jsonl.zst`), `@FILE` (a manifest, see
            manifest.py), `-` for standard input, or an address such as `s3://…` of a file, folder or pattern. An empty
            list and the single input `default` both stand for the default corpus.
        spool: The path to which the content of a pipe is copied. Further pipes are copied to `spool`.1 and so on.

    Returns:
        The files of all inputs.

    Raises:
        UserError: An input does not exist or contains no text.
    """
    if not inputs or list(inputs) == [DEFAULT_CORPUS]:
        return [InputFile(DEFAULT_CORPUS, FileFormat.DEFAULT_CORPUS, 0, "")]
    if DEFAULT_CORPUS in inputs:
        do = f"remove one of them, or write ./{DEFAULT_CORPUS} if it is a file"
        what = f"`{DEFAULT_CORPUS}` stands for the default corpus and cannot be combined with files"
        raise UserError(what, "INPUT", do)
    manifests, pipes = ManifestReader(), _PipeCopier(spool)
    files = [file for name in inputs for file in _find(name, pipes, manifests)]
    weights = manifests.weights({file.corpus for file in files})
    return [replace(file, weight=weights.get(file.corpus)) for file in files]


def _find(name: str, pipes: _PipeCopier, manifests: ManifestReader) -> Iterator[InputFile]:
    if name == STANDARD_INPUT:
        yield pipes.copy(sys.stdin.buffer)
    elif name.startswith(_MANIFEST) and not os.path.exists(name):
        yield from _find_in_manifest(Path(name[1:]), pipes, manifests)
    elif is_remote(name):
        yield from _find_remote(name)
    else:
        yield from _find_local(name, pipes)


def _find_local(name: str, pipes: _PipeCopier, corpus: str = "") -> Iterator[InputFile]:
    for path in _local_paths(name):
        status = path.stat()
        if stat.S_ISFIFO(status.st_mode):  # for example <(command) in a shell, which can be read only once
            with path.open("rb") as pipe:
                yield pipes.copy(pipe, corpus)
            continue
        if not stat.S_ISREG(status.st_mode):
            raise UserError("this is not a file", str(path), "use files, folders, patterns or pipes")
        file_format, compression = detect_format(str(path))
        yield InputFile(str(path), file_format, status.st_size, str(status.st_mtime_ns), compression, corpus)


def _local_paths(name: str) -> list[Path]:
    """Return the paths of a file, folder or pattern. Raises UserError if there are none."""
    path = Path(name)
    if path.is_dir():
        found = sorted(_walk(path))
        if not found:
            do = f"put {SUPPORTED_SUFFIXES} files into it, or use another folder"
            raise UserError("the folder contains no text files", name, do)
        return found
    if path.exists():
        return [path]
    found = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if not os.path.isdir(match)]
    if not found and _PATTERN_CHARACTERS & set(name):
        raise UserError(
            "no file matches this pattern", name, "correct it, and quote it so that the shell does not expand it"
        )
    if not found:
        raise UserError("there is no such file or folder", name, _CORRECT_PATH)
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder that have a supported suffix and are not hidden."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and has_supported_suffix(name):
                yield Path(parent, name)


def _find_remote(address: str, corpus: str = "") -> Iterator[InputFile]:
    """Yield the files of a remote address, as listed by fsspec."""
    filesystem, inner = open_filesystem(address)
    try:
        found = [
            (name, filesystem.info(name), _remote_supports_ranges(filesystem, name))
            for name in _remote_names(filesystem, inner)
        ]
    except Exception as error:  # each store's package raises its own exceptions
        do = "check the address, that it can be reached, and that you have permission to read it"
        raise UserError(f"cannot list this store: {type(error).__name__}: {error}", address, do) from None
    if not found:
        do = f"correct the address; of a folder, {SUPPORTED_SUFFIXES} files are read"
        raise UserError("no text file was found there", address, do)
    for name, info, has_ranges in found:
        path = filesystem.unstrip_protocol(name)
        file_format, compression = detect_format(path)
        # For web servers, `ukey` depends only on the address. The ETag and the date are therefore included.
        fingerprint = str([filesystem.ukey(name), info.get("ETag"), info.get("Last-Modified")])
        yield InputFile(
            path, file_format, info["size"] or 0, fingerprint, compression, corpus, supports_ranges=has_ranges
        )


def _remote_supports_ranges(filesystem: Any, name: str) -> bool:
    return not is_http(filesystem) or supports_ranges(filesystem.unstrip_protocol(name))


def _remote_names(filesystem: Any, inner: str) -> list[str]:
    """Return the files of a remote path, which can be a pattern, a single file or a folder."""
    pattern = _PATTERN_CHARACTERS
    if is_http(filesystem):
        pattern = pattern - {"?"}  # in a web address, "?" begins the query
    if pattern & set(inner):
        return sorted(filesystem.glob(inner))
    if has_supported_suffix(inner) or not filesystem.isdir(inner):  # for web servers, isdir can be True for a file
        return [inner] if filesystem.exists(inner) else []
    return sorted(name for name in filesystem.find(inner) if has_supported_suffix(name))


def _find_in_manifest(path: Path, pipes: _PipeCopier, manifests: ManifestReader) -> Iterator[InputFile]:
    for entry in manifests.read(path):
        try:
            if is_remote(entry.path):
                yield from _find_remote(entry.path, entry.corpus)
            else:
                yield from _find_local(str(path.parent / entry.path), pipes, entry.corpus)
        except UserError as error:
            problem = error.problems[0]
            raise UserError(problem.what, f"{problem.where}\n{entry.where}", problem.do) from None


class _PipeCopier:
    """Copies pipes to files.

    A pipe can be read only once. Its content must be read more than once, because the format is detected first, and
    large files are read in several ranges.
    """

    def __init__(self, spool: Path) -> None:
        self._spool, self._count = spool, 0

    def copy(self, pipe: IO[bytes], corpus: str = "") -> InputFile:
        """Copy a pipe to the next file, and return that file."""
        path = self._spool
        if self._count:
            path = path.with_name(f"{path.name}.{self._count}")
        self._count += 1
        with ChecksummedFile(path) as file:
            size = 0
            while block := pipe.read(1 << 20):
                file.write(block)
                size += len(block)
        file_format, compression = detect_format(str(path))
        return InputFile(str(path), file_format, size, str(file.crc32), compression, corpus)
