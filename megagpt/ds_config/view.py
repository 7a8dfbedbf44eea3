"""Values of a DeepSpeed config by dotted key, as the rules ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megagpt.errors import Problem
from megagpt.recipe.reading import ConfigTree
from megagpt.recipe.wording import TableRow, format_table


@dataclass(frozen=True)
class ConfigView:
    """A tree whose malformed values are left out, so that no mistake is reported twice."""

    tree: ConfigTree
    broken: frozenset[str]

    def is_given(self, key: str) -> bool:
        """Whether the key stands in the file and is well formed."""
        return self.get(key, _ABSENT) is not _ABSENT

    def is_valid(self, key: str) -> bool:
        """Whether neither the key nor a section around it is malformed."""
        return not any(key == b or key.startswith(f"{b}.") for b in self.broken)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key, or the default where it is absent or malformed."""
        if not self.is_valid(key):
            return default
        try:
            return self.tree.value(key)
        except KeyError:
            return default

    def explicit(self, key: str, default: Any) -> Any:
        """As get, with "auto" and null counted as absent."""
        value = self.get(key)
        return default if value in (None, "auto") else value

    def row(self, key: str, value: Any = None) -> TableRow:
        """A line of an error's table."""
        place = self.tree.locations.get(key)
        return key, self.get(key) if value is None else value, place.at if place else "default"

    def problem(self, what: str, keys: Sequence[str], do: str, *, defaults: Sequence[TableRow] = ()) -> Problem:
        """A problem that stands at one key, or between several."""
        rows = [self.row(key) for key in keys] + list(defaults)
        return Problem(what, format_table(rows) if len(rows) > 1 else self.tree.where(keys[0]), do)


_ABSENT = object()
