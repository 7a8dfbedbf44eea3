"""Manifests, which list input files and the corpora to which they belong.

Each line has one of these forms:

    PATH                      adds the file to the corpus OUTPUT
    PATH <tab> NAME           adds the file to the corpus OUTPUT.NAME
    PATH <tab> NAME <tab> 7   also sets the weight of this corpus in a blend to 7 (one line per corpus is enough)

Relative paths are relative to the manifest's folder. Empty lines and lines that start with # are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple

from megagpt.errors import UserError


class ManifestEntry(NamedTuple):
    """Entry of a manifest.

    Attributes:
        path: The path of the input file.
        corpus: The name of the corpus to which the file belongs, or "" if the line names no corpus.
        where: The location of the entry as `file:line`.
    """

    path: str
    corpus: str
    where: str


class ManifestReader:
    """Reads manifests, and collects the corpora and weights that they name."""

    def __init__(self) -> None:
        self._first_mention: dict[str, str] = {}  # location of the first entry of each corpus
        self._weights: dict[str, tuple[float, str]] = {}  # weight of each corpus, and the location of the weight

    def read(self, path: Path) -> Iterator[ManifestEntry]:
        """Yield the entries of a manifest. Raises UserError if the file cannot be read, or if a line is invalid."""
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            do = "write one path per line, in UTF-8"
            raise UserError(f"cannot read the manifest: {error}", str(path), do) from None
        for number, line in enumerate(lines, 1):
            file, *columns = (column.strip() for column in line.split("\t"))
            if line.strip() and not file.startswith("#"):
                yield self._entry(file, columns, f"{path}:{number}")

    def weights(self, corpora: Set[str]) -> Mapping[str, float]:
        """Return the weight of each corpus, or an empty mapping if no corpus has a weight.

        Args:
            corpora: The names of all corpora of the input, where "" is the corpus without a name.

        Raises:
            UserError: Only some of the corpora have a weight.
        """
        if self._weights:
            for corpus in sorted(corpora - self._weights.keys()):
                _, example = next(iter(self._weights.values()))
                what = f"`{corpus}` has no weight" if corpus else "files without a named corpus have no weight"
                where = f"{self._first_mention.get(corpus, 'INPUT')}\n{example}: a weight"
                raise UserError(what, where, "give every corpus a name and a weight, or give none a weight")
        return {corpus: weight for corpus, (weight, _) in self._weights.items()}

    def _entry(self, path: str, columns: list[str], where: str) -> ManifestEntry:
        if not path or len(columns) > 2:
            what = f"this line has {1 + len(columns)} columns" if path else "this line names no file"
            raise UserError(what, where, "write PATH, or PATH <tab> NAME, or PATH <tab> NAME <tab> WEIGHT")
        corpus, weight = [*columns, "", ""][:2]
        if corpus and (corpus.isdecimal() or not corpus.replace("-", "").replace("_", "").isalnum()):
            do = (
                "use letters, digits, - and _ in the name, after one tab; a weight comes after the name and another tab"
            )
            raise UserError(f"`{corpus}` cannot be the name of a corpus", where, do)
        if weight:
            self._set_weight(corpus, weight, where)
        self._first_mention.setdefault(corpus, where)
        return ManifestEntry(path, corpus, where)

    def _set_weight(self, corpus: str, text: str, where: str) -> None:
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not corpus or not 0 < weight < math.inf:
            what = f"`{text}` is not a weight" if corpus else f"the weight {text} has no corpus name before it"
            raise UserError(what, where, "write PATH <tab> NAME <tab> WEIGHT, with a weight above 0")
        known, known_where = self._weights.setdefault(corpus, (weight, where))
        if known != weight:
            what = f"`{corpus}` has the weights {known:g} and {weight:g}"
            do = "a weight applies to the whole corpus: give it once, or the same one each time"
            raise UserError(what, f"{known_where}\n{where}", do)
