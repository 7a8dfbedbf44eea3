"""Documents out of files (txt, md, jsonl), and which of them are put aside for validation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import Problem, UserError

SUFFIXES = (".txt", ".md", ".jsonl")
DEFAULT_FRACTION = 0.04
_MOST_PROBLEMS = 20  # reported at once; reading stops there
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """One text with the name of the place it came from, such as `books/a.txt` or `part.jsonl:17`.

    `key` is what the validation split hashes: the text when empty, so that copies of a text stay together
    and a renamed file stays where it was. `invalid_utf8` counts U+FFFD that stand for broken bytes.
    """

    name: str
    text: str
    key: str = ""
    invalid_utf8: int = 0


def read_documents(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Document]:
    """Documents of files and folders, in the order given; a folder's files in the order of their names.

    A .txt or .md file is one document, a line of a .jsonl file is one (key "text"; blank lines are passed over).
    Raises UserError for a path that is missing or of another kind at once, and for broken lines all together
    (at most 20) when the last file has been read.
    """
    files = [found for path in paths for found in _files(Path(path))]
    problems: list[Problem] = []
    for path, name in files:
        if path.suffix.lower() == ".jsonl":
            yield from _lines(path, name, problems)
        else:
            text, invalid = _decode(_read(path).removeprefix(_BOM))
            yield Document(name, text, invalid_utf8=invalid)
    if problems:
        raise UserError.of(problems)


def in_validation(document: Document, fraction: float) -> bool:
    """Whether the document belongs to the validation part that takes `fraction` of all documents.

    Decided by a hash of its key alone: adding documents moves none, a larger fraction keeps those of a smaller.
    """
    key = (document.key or document.text).encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.md5(key, usedforsecurity=False).digest(), "big")
    # Twentieths first: at 0.04 (and 0.05) the default corpus gives the 13 documents on which our figures were measured.
    return (number % 20 + (number // 20 % 2**32) / 2**32) / 20 < fraction


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """The files that a path stands for, each with its name relative to what was given."""
    if path.is_dir():
        found = sorted(_walk(path))
        if not found:
            do = f"put {', '.join(SUFFIXES)} files into it, or name another folder"
            raise UserError("the folder holds no text files", str(path), do)
        for file in found:
            yield file, file.relative_to(path).as_posix()
    elif not path.exists():
        do = "correct the path; the word `default` stands for the default corpus"
        raise UserError("there is no such file or folder", str(path), do)
    elif path.suffix.lower() not in SUFFIXES:
        do = f"give {', '.join(SUFFIXES)} files, or rename this one if it is plain text"
        raise UserError(f"cannot tell what kind of file this is ({path.suffix or 'no ending'})", str(path), do)
    else:
        yield path, path.name


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(parent, name)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", str(path), "check its permissions") from None


def _decode(raw: bytes) -> tuple[str, int]:
    """Text of the bytes, and how many U+FFFD had to stand in for what is not UTF-8."""
    try:
        return raw.decode(), 0
    except UnicodeDecodeError:
        text = raw.decode(errors="replace")
        return text, text.count("\ufffd") - raw.count("\ufffd".encode())


def _lines(path: Path, name: str, problems: list[Problem]) -> Iterator[Document]:
    """Documents of a .jsonl file; what is wrong with a line goes to `problems`."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", str(path), "check its permissions") from None
    with file:
        # Bytes, cut at \n only: str.splitlines would also cut at U+2028 inside a text.
        for number, raw in enumerate(file, start=1):
            line, invalid = _decode(raw.removeprefix(_BOM) if number == 1 else raw)
            if not line.strip():
                continue
            text = _text_of(line)
            if isinstance(text, str):
                yield Document(f"{name}:{number}", text, invalid_utf8=invalid)
                continue
            problems.append(Problem(text.what, f"{path}:{number}", text.do))
            if len(problems) == _MOST_PROBLEMS:
                raise UserError.of([*problems, Problem("reading stopped: too many broken lines")])


def _text_of(line: str) -> str | Problem:
    """The text of a JSON line, or what is wrong with it."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return Problem(f"broken JSON: {error.msg} at column {error.colno}", do="mend or remove the line")
    except ValueError as error:  # a number of thousands of digits
        return Problem(f"broken JSON: {error}", do="mend or remove the line")
    except RecursionError:
        return Problem("broken JSON: nested too deeply", do="mend or remove the line")
    if not isinstance(value, dict) or "text" not in value:
        return Problem('no key "text" in this line', do='write each line as {"text": "..."}')
    text = value["text"]
    if not isinstance(text, str):
        return Problem(f'"text" is {json.dumps(text)[:30]}, not a string', do="put the text into quotes")
    return text
