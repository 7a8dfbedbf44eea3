"""The state of an engine without its layout: each rank's stretches of weights and moments, by parameter name.

The same way saves and restores at every layout. Restoring follows the one order that holds at all ZeRO stages:
masters first; then one update with zero gradient and zero rate, by which DeepSpeed itself makes the moments and
carries the masters into the model's weights, wherever copies of them are; then moments and step count. At the end
a checksum of every tensor, read back from the live engine, is compared with the one taken when it was saved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from megagpt.checkpoint import tensor_files
from megagpt.checkpoint.tensor_files import FOLDER, WEIGHT, ShardIndex, TensorFiles, TensorSlice
from megagpt.cluster import Collectives, Rank
from megagpt.config.deepspeed import Layout
from megagpt.config.recipe import ModelSection
from megagpt.engine.optim import lr_schedule
from megagpt.engine.state import loss_scale
from megagpt.engine.state.partitions import MOMENTS, Share, Shares, shares_of
from megagpt.engine.state.rng_and_loss_scale import random_state, set_random_state
from megagpt.errors import UserError
from megagpt.files import WriteFile, parse_json
from megagpt.model.gpt import GPT
from megagpt.model.sharding import shard_spec

_SUMMARY = f"{FOLDER}/state.json"


@dataclass(frozen=True)
class Portable:
    """Saves and restores one DeepSpeed engine.

    `names` gives this rank's parameters their names in `GPT`. `copies` are names of those that another pipeline
    stage saves.
    """

    engine: Any
    names: Mapping[torch.nn.Parameter, str]
    section: ModelSection
    layout: Layout
    rank: Rank
    collectives: Collectives
    copies: frozenset[str] = frozenset()

    def save(self, sink: WriteFile) -> None:
        """Write this rank's stretches and random state, and on rank 0 the rest; collective."""
        shares = shares_of(self.engine, self.names)
        mine = self._mine(shares)
        tensor_files.write_slices(self._pieces(shares, mine), self.rank.rank, sink)
        number, part = divmod(self.rank.rank, self.layout.tensor_parallel)
        if part == 0:  # tensor parts draw the same numbers
            sink(_random_file(number), to_bytes(random_state()))
        sums, _ = self._checksums(shares, mine)
        steps = self.collectives.all_gather_object(_adam_step(shares))
        if self.rank.main:
            summary = {
                "adam_step": max(steps),
                "scheduled": lr_schedule.done(self.engine.lr_scheduler),
                "loss_scale": loss_scale.numbers(self.engine.optimizer),
                "checksums": {key: f"{value:016x}" for key, value in sums.items()},
            }
            sink(_SUMMARY, json.dumps(summary, indent=1).encode())

    def load(self, folder: Path, idle_update: Callable[[], object]) -> None:
        """Restore what any layout saved; collective. `idle_update` makes an update without a single valid label.

        Raises UserError where something is missing, or did not arrive as it was saved.
        """
        summary = _summary(folder / _SUMMARY)
        source = TensorFiles(folder, self.rank.rank)
        shares = shares_of(self.engine, self.names)
        for share in shares.all():
            shares.put(share, WEIGHT, self._read(source, share, WEIGHT))
        with _no_step(shares.optimizer, self.names):
            idle_update()
        shares = shares_of(self.engine, self.names)  # the moments exist now
        for share in shares.all():
            for kind in shares.kinds(share):
                shares.put(share, kind, self._read(source, share, kind))
        _set_adam_step(shares.optimizer, summary["adam_step"])
        self.engine.global_steps = summary["scheduled"]
        lr_schedule.go_to(self.engine.lr_scheduler, summary["scheduled"])
        loss_scale.set_numbers(self.engine.optimizer, summary["loss_scale"])
        self._verify(shares, summary["checksums"], folder)
        _set_random_state(folder, self.rank.rank // self.layout.tensor_parallel)

    def _mine(self, shares: Shares) -> list[Share]:
        """What this rank saves: each element of the model is in it on one rank."""
        replicas = self.layout.data_parallel * self.layout.sequence_parallel
        replica = self.rank.rank // self.layout.tensor_parallel % replicas
        first = self.rank.rank % self.layout.tensor_parallel == 0
        return [
            share
            for share in shares.own(replica, replicas)
            if share.name not in self.copies and (first or self._part(share.name).degree > 1)
        ]

    def _part(self, name: str) -> ShardIndex:
        """Which part of the parameter this rank holds."""
        degree = self.layout.tensor_parallel
        return (
            ShardIndex()
            if shard_spec(name, self.section, degree) is None
            else ShardIndex(self.rank.rank % degree, degree)
        )

    def _pieces(self, shares: Shares, which: list[Share]) -> Iterator[TensorSlice]:
        for share in which:
            for kind in (WEIGHT, *shares.kinds(share)):
                yield TensorSlice(kind, share.name, share.start, shares.get(share, kind), self._part(share.name))

    def _read(self, source: TensorFiles, share: Share, kind: str) -> Tensor:
        """A stretch from the checkpoint; only where the tensor degree has changed is the whole tensor read for it."""
        part = self._part(share.name)
        if source.degree(share.name) == part.degree:
            return source.read(kind, share.name, share.start, share.numel, part)
        whole = source.read_whole(kind, share.name, self._shapes()[share.name], self.section)
        return self._of_part(whole, share)

    def _of_part(self, whole: Tensor, share: Share) -> Tensor:
        """The stretch of this rank's part of a whole tensor."""
        part = self._part(share.name)
        cut = shard_spec(share.name, self.section, part.degree)
        mine = whole if cut is None else cut.shard(whole, part.number, part.degree)
        return mine.reshape(-1)[share.start : share.start + share.numel]

    def _shapes(self) -> dict[str, torch.Size]:
        """Name → whole shape of every parameter of the model, on whatever rank it is."""
        with torch.device("meta"):
            return {name: parameter.shape for name, parameter in GPT(self.section).named_parameters()}

    def _checksums(self, shares: Shares, which: list[Share]) -> tuple[dict[str, int], dict[str, int]]:
        """`kind:name` → checksum over all ranks' stretches, and how many elements went into it; collective."""
        shapes = self._shapes()
        keys = [f"{kind}:{name}" for kind in (WEIGHT, *MOMENTS) for name in shapes]
        sums, counts = dict.fromkeys(keys, 0), dict.fromkeys(keys, 0)
        for share in which:
            places: Tensor | int = share.start
            if self._part(share.name).degree > 1:
                shape = shapes[share.name]
                places = self._of_part(torch.arange(shape.numel()).view(shape), share)
            for kind in (WEIGHT, *shares.kinds(share)):
                sums[f"{kind}:{share.name}"] += tensor_files.checksum(shares.get(share, kind), places)
                counts[f"{kind}:{share.name}"] += share.numel
        totals = self.collectives.all_reduce_sum_integers([*sums.values(), *counts.values()])
        sums, counts = dict(zip(keys, totals, strict=False)), dict(zip(keys, totals[len(keys) :], strict=True))
        return {key: sums[key] for key in keys if counts[key]}, counts

    def _verify(self, shares: Shares, expected: Mapping[str, str], folder: Path) -> None:
        """Compare what is in the engine now with what was saved; a replicated tensor counts as often as it is held."""
        sums, counts = self._checksums(shares, shares.all())
        shapes = self._shapes()
        wrong = sorted({*expected} ^ {*sums})
        for key in {*expected} & {*sums}:
            copies, rest = divmod(counts[key], shapes[key.partition(":")[2]].numel())
            if rest or sums[key] != int(expected[key], 16) * copies % (1 << 64):
                wrong.append(key)
        if wrong:
            raise UserError(
                f"{len(wrong)} tensors did not arrive in the engine as they were saved",
                "\n".join([str(folder), *wrong[:10]]),
                "remove this checkpoint so that the one before it is taken",
            )


class _no_step:  # reads as a statement
    """Within it the optimizer changes no weight: rate, decay and gradient are zero, whatever the weights are now."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._groups, self._parameters = optimizer.param_groups, list(parameters)

    def __enter__(self) -> None:
        self._kept = [(group["lr"], group["weight_decay"]) for group in self._groups]
        for group in self._groups:
            group["lr"] = group["weight_decay"] = 0.0
        # weights that are not finite would make a gradient that DeepSpeed does not step on, even of no loss at all
        self._hooks = [parameter.register_hook(torch.zeros_like) for parameter in self._parameters]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for group, (rate, decay) in zip(self._groups, self._kept, strict=True):
            group["lr"], group["weight_decay"] = rate, decay


def _summary(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself beside its tensors. Raises UserError if that is damaged."""
    try:
        summary = dict(parse_json(path.read_text(encoding="utf-8")))
        if missing := {"adam_step", "scheduled", "loss_scale", "checksums"} - summary.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, TypeError) as error:
        do = "remove this checkpoint so that the one before it is used"
        raise UserError(f"the state of the optimizer cannot be read: {error}", str(path), do) from None
    return summary


def _adam_step(shares: Shares) -> int:
    """Updates that AdamW has made, which its bias correction counts; 0 where it has none on this rank."""
    steps = [int(state["step"]) for state in shares.optimizer.state.values() if "step" in state]
    return max(steps, default=0)


def _set_adam_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].fill_(step)
        elif "step" in state:
            state["step"] = step


def _random_file(number: int) -> str:
    return f"{FOLDER}/random-{number:05d}.safetensors"


def _set_random_state(folder: Path, number: int) -> None:
    """Restore the random state of this number; one that was not saved begins anew from the first one's seed."""
    path = folder / _random_file(number)
    set_random_state(load_file(path if path.exists() else folder / _random_file(0)))
    if not path.exists():
        torch.manual_seed(torch.initial_seed() + number)
