"""Do ranks that should hold the same weights hold the same? Compared by checksums, bit for bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from megagpt.checkpoint import tensor_files
from megagpt.cluster import Collectives, Rank
from megagpt.config.deepspeed import Layout
from megagpt.config.recipe import ModelSection
from megagpt.model.gpt import GPT
from megagpt.model.sharding import shard_spec

_ABSENT = -1  # below every checksum
_PRIME = (1 << 61) - 1  # checksums are taken modulo it, so that their negatives are 64-bit numbers, too
_SHOWN = 10


def differences(
    names: Mapping[torch.nn.Parameter, str], section: ModelSection, layout: Layout, rank: Rank, collectives: Collectives
) -> list[str]:
    """A line for each weight that several ranks should hold alike and do not; collective, the same on every rank.

    `names` are this rank's whole weights, or its tensor-parallel parts of them. What is compared are the weights that
    the model computes with, between updates. One number for each goes between the ranks, unless they differ.
    """
    mine = {_key(name, section, layout, rank): _checksum(parameter) for parameter, name in names.items()}
    with torch.device("meta"):
        keys = [
            f"{name}{part}"
            for name, _ in GPT(section).named_parameters()
            for part in _parts(name, section, layout.tensor_parallel)
        ]
    largest = collectives.all_reduce_max([mine.get(key, _ABSENT) for key in keys])
    smallest = collectives.all_reduce_max([-mine.get(key, _PRIME) for key in keys])
    wrong = [key for key, high, low in zip(keys, largest, smallest, strict=True) if high not in (_ABSENT, -low)]
    held = collectives.all_gather_object({key: mine.get(key) for key in wrong[:_SHOWN]})
    return [_line(key, [values[key] for values in held]) for key in wrong[:_SHOWN]]


def _checksum(parameter: torch.nn.Parameter) -> int:
    return tensor_files.checksum(parameter.detach().reshape(-1), 0) % _PRIME


def _key(name: str, section: ModelSection, layout: Layout, rank: Rank) -> str:
    parts = _parts(name, section, layout.tensor_parallel)
    return name + parts[rank.rank % len(parts)]


def _parts(name: str, section: ModelSection, degree: int) -> list[str]:
    """How the shares of a parameter are told apart; ranks that hold the same share, or all of it, should agree."""
    if shard_spec(name, section, degree) is None:
        return [""]
    return [f" part {part} of {degree}" for part in range(degree)]


def _line(key: str, values: list[int | None]) -> str:
    """Who holds what, the greater party first."""
    parties = defaultdict(list)
    for rank, value in enumerate(values):
        if value is not None:
            parties[value].append(str(rank))
    ranked = sorted(parties.values(), key=len, reverse=True)
    return f"{key}: " + " is not that of ".join(f"rank {', '.join(ranks)}" for ranks in ranked)
