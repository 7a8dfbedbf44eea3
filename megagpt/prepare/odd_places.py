"""InputWarnings for people: counts over all shards, and places as `file:line`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from megagpt.data.oddities import WARNING_KINDS, InputLocation, InputWarnings, LocatedError
from megagpt.data.sources import InputFile
from megagpt.errors import UserError
from megagpt.prepare.summary import WarningCount


def summarize(shards: Iterable[InputWarnings], sources: Sequence[InputFile]) -> tuple[WarningCount, ...]:
    """All kinds that occurred, from shards in their order."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    lines: Counter[int] = Counter()
    for shard in shards:
        counts.update(shard.counts)
        for kind, place in shard.first.items():
            first.setdefault(kind, _named(place, lines, sources))
        lines.update(shard.lines)
    return tuple(WarningCount(kind, counts[kind], first[kind]) for kind in WARNING_KINDS if counts[kind])


def locate(error: LocatedError, earlier: Iterable[InputWarnings], sources: Sequence[InputFile]) -> UserError:
    """An error at a place for people; `earlier` are of the shards before its own."""
    lines: Counter[int] = Counter()
    for shard in earlier:
        lines.update(shard.lines)
    return error.to_user_error(_named(error.place, lines, sources))


def _named(place: InputLocation, earlier: Mapping[int, int], sources: Sequence[InputFile]) -> str:
    """A place for people. `earlier` lines of each source were read before those that it counts from."""
    path = sources[place.source].path
    return f"{path}:{earlier.get(place.source, 0) + place.line}" if place.line else path
