"""Where a recipe's values were given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SourceLocation:
    """Where a value was given: `at` is FILE:LINE or "command line", `word` what stands there."""

    at: str
    word: str


@dataclass(frozen=True)
class SourceLocations:
    """Dotted key → where it was given. All are equal: recipes compare by their values."""

    given: Mapping[str, SourceLocation] = field(default_factory=dict, compare=False)
