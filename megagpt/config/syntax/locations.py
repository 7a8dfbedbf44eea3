"""Source locations, which record where each value of a recipe or config was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SourceLocation:
    """The place at which one value was given."""

    at: str
    """FILE:LINE, or "command line" """
    text: str
    """the text at that location: the key, or the whole `key=value` argument"""


@dataclass(frozen=True)
class SourceLocations:
    """Maps dotted keys to the locations of their values.

    All instances compare equal, so recipes are compared by their values alone.
    """

    by_key: Mapping[str, SourceLocation] = field(default_factory=dict, compare=False)
