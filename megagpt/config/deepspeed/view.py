"""Access to the valid values of a DeepSpeed config by dotted key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megagpt.config.syntax.formatting import TableRow, format_table
from megagpt.config.syntax.yaml_reader import ConfigTree
from megagpt.errors import Problem

_ABSENT = object()


@dataclass(frozen=True)
class ConfigView:
    """View of a config that hides malformed values, so that no mistake is reported twice."""

    tree: ConfigTree
    broken: frozenset[str]
    """keys that are unknown or have malformed values"""

    def is_given(self, key: str) -> bool:
        """Return whether the config has the key, with a well-formed value."""
        return self.get(key, _ABSENT) is not _ABSENT

    def is_valid(self, key: str) -> bool:
        """Return whether neither the key nor a section around it is malformed."""
        return not any(key == broken or key.startswith(f"{broken}.") for broken in self.broken)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a dotted key, or `default` if it is absent or malformed."""
        if not self.is_valid(key):
            return default
        try:
            return self.tree.value(key)
        except KeyError:
            return default

    def explicit(self, key: str, default: Any) -> Any:
        """Return the value of a dotted key, or `default` if it is absent, malformed, "auto" or null."""
        value = self.get(key)
        return default if value in (None, "auto") else value

    def row(self, key: str) -> TableRow:
        """Return the row for a key in the table of an error message: key, value and location."""
        location = self.tree.locations.get(key)
        return key, self.get(key), location.at if location else "default"

    def problem(self, what: str, keys: Sequence[str], do: str, *, defaults: Sequence[TableRow] = ()) -> Problem:
        """Return a problem that involves one or several keys, with a table of their values.

        Args:
            what: description of what is wrong.
            keys: the keys of the config that are involved.
            do: advice on what to do about it.
            defaults: additional table rows for values that the config does not contain, such as those of the recipe.

        Returns:
            The problem.
        """
        rows = [*(self.row(key) for key in keys), *defaults]
        return Problem(what, format_table(rows) if len(rows) > 1 else self.tree.where(keys[0]), do)
