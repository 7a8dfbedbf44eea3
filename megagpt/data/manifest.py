"""Manifests: files that list what is prepared, a path a line, and to which corpus it goes.

    PATH                      to the corpus OUTPUT
    PATH <tab> NAME           to the corpus OUTPUT.NAME, with all others of this name
    PATH <tab> NAME <tab> 7   and in a blend this corpus has the weight 7; one line of each name is enough

Relative paths count from the manifest's folder. Empty lines, and those that begin with #, say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple

from megagpt.errors import UserError


class ManifestEntry(NamedTuple):
    """What a line asks for, and `where` it stands (`file:line`)."""

    name: str
    corpus: str
    where: str


class ManifestReader:
    """Reads manifests, and remembers what they say of each corpus."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}  # where each corpus is first named
        self._weights: dict[str, tuple[float, str]] = {}  # and its weight, and where that stands

    def read(self, path: Path) -> Iterator[ManifestEntry]:
        """The lines of a manifest. Raises UserError where it cannot be read, or a line is wrong."""
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the manifest: {error}", str(path), "write a path a line, in UTF-8") from None
        for number, line in enumerate(lines, 1):
            name, *columns = (column.strip() for column in line.split("\t"))
            if line.strip() and not name.startswith("#"):
                yield self._line(name, columns, f"{path}:{number}")

    def weights(self, corpora: Set[str]) -> Mapping[str, float]:
        """The weight of each corpus: of all, or of none. Raises UserError otherwise."""
        for corpus in sorted(corpora - self._weights.keys()) if self._weights else ():
            _, where = next(iter(self._weights.values()))
            what = f"`{corpus}` has no weight" if corpus else "files that go to no named corpus have no weight"
            place = f"{self._first.get(corpus, 'INPUT')}\n{where}: a weight"
            raise UserError(what, place, "give every corpus a name and a weight, or none a weight")
        return {corpus: weight for corpus, (weight, _) in self._weights.items()}

    def _line(self, name: str, columns: list[str], where: str) -> ManifestEntry:
        if not name or len(columns) > 2:
            what = f"this line has {1 + len(columns)} columns" if name else "this line names no file"
            raise UserError(what, where, "write PATH, or PATH <tab> NAME, or PATH <tab> NAME <tab> WEIGHT")
        corpus, weight = [*columns, "", ""][:2]
        if corpus and (corpus.isdecimal() or not corpus.replace("-", "").replace("_", "").isalnum()):
            do = (
                "name corpora by letters, digits, - and _, after one tab; a weight comes after the name and another tab"
            )
            raise UserError(f"`{corpus}` cannot be the name of a corpus", where, do)
        if weight:
            self._weigh(corpus, weight, where)
        self._first.setdefault(corpus, where)
        return ManifestEntry(name, corpus, where)

    def _weigh(self, corpus: str, text: str, where: str) -> None:
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not corpus or not 0 < weight < math.inf:
            what = f"`{text}` is no weight" if corpus else f"the weight {text} stands behind no name"
            raise UserError(what, where, "write PATH <tab> NAME <tab> WEIGHT, the weight a number above 0")
        known, place = self._weights.setdefault(corpus, (weight, where))
        if known != weight:
            what = f"`{corpus}` has the weights {known:g} and {weight:g}"
            raise UserError(what, f"{place}\n{where}", "a weight is of the whole corpus: give it once, or the same one")
