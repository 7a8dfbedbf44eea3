"""Check that all replicas of a weight are bitwise identical, by comparing their checksums."""

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

# Value in place of a checksum for a weight that this rank does not hold. It is less than every checksum.
_ABSENT = -1
# Checksums are reduced modulo this prime, so that they and their negatives fit into 64 bits.
_PRIME = (1 << 61) - 1
_REPORTED = 10


def differences(
    names: Mapping[torch.nn.Parameter, str], section: ModelSection, layout: Layout, rank: Rank, collectives: Collectives
) -> list[str]:
    """Describe each weight that differs between ranks that should hold the same values. Collective.

    This compares the weights in the model's precision, not the fp32 master weights, and must be called between updates.
    Unless there are differences, the ranks exchange only two numbers per weight.

    Args:
        names: The name in `GPT` of each weight on this rank. A weight may be a tensor-parallel shard.
        section: The model section of the recipe.
        layout: The layout of the job.
        rank: This rank.
        collectives: The collectives of the job.

    Returns:
        One line for each weight that differs, but at most ten lines. The result is the same on every rank.
    """
    local = {_key(name, section, layout, rank): _checksum(parameter) for parameter, name in names.items()}
    with torch.device("meta"):
        keys = [
            f"{name}{shard}"
            for name, _ in GPT(section).named_parameters()
            for shard in _shard_labels(name, section, layout.tensor_parallel)
        ]
    largest = collectives.all_reduce_max([local.get(key, _ABSENT) for key in keys])
    smallest = collectives.all_reduce_max([-local.get(key, _PRIME) for key in keys])
    wrong = [key for key, high, low in zip(keys, largest, smallest, strict=True) if high not in (_ABSENT, -low)]
    reported = {key: local.get(key) for key in wrong[:_REPORTED]}
    by_rank = collectives.all_gather_object(reported)
    return [_describe(key, [checksums[key] for checksums in by_rank]) for key in reported]


def _checksum(parameter: torch.nn.Parameter) -> int:
    return tensor_files.checksum(parameter.detach().reshape(-1), 0) % _PRIME


def _key(name: str, section: ModelSection, layout: Layout, rank: Rank) -> str:
    labels = _shard_labels(name, section, layout.tensor_parallel)
    return name + labels[rank.rank % len(labels)]


def _shard_labels(name: str, section: ModelSection, degree: int) -> list[str]:
    """Return a label for each shard of a parameter. Weights with the same name and label must be identical."""
    if shard_spec(name, section, degree) is None:
        return [""]
    return [f" shard {index} of {degree}" for index in range(degree)]


def _describe(key: str, checksums: list[int | None]) -> str:
    """Return a line that lists the groups of ranks with equal weights, the largest group first."""
    groups = defaultdict(list)
    for rank, checksum in enumerate(checksums):
        if checksum is not None:
            groups[checksum].append(str(rank))
    ranked = sorted(groups.values(), key=len, reverse=True)
    return f"{key} differs between " + " and ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(ranks)}" for ranks in ranked
    )
