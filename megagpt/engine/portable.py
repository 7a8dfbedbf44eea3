"""The state of an engine without its layout: each rank's stretches of weights and moments, by parameter name.

The same way saves and restores at every layout. Restoring follows the one order that holds at all ZeRO stages:
masters first; then one update with zero gradient and zero rate, by which DeepSpeed itself makes the moments and
carries the masters into the model's weights, wherever copies of them are; then moments and step count. At the end
a checksum of every tensor, read back from the live engine, is compared with the one taken when it was saved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from megagpt.distributed import Agreement, Rank
from megagpt.engine import schedule
from megagpt.engine.shares import Share, Shares, shares_of
from megagpt.errors import UserError
from megagpt.files import Write
from megagpt.model import pieces
from megagpt.model.pieces import FOLDER, WEIGHT, Piece, Pieces

_SUMMARY = f"{FOLDER}/state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True)
class Portable:
    """Saves and restores one DeepSpeed engine.

    `names` gives this rank's parameters their names in `GPT`; `sizes` the elements of every parameter of the model,
    on whatever rank it is.
    """

    engine: Any
    names: Mapping[torch.nn.Parameter, str]
    sizes: Mapping[str, int]
    rank: Rank
    agreement: Agreement

    def save(self, sink: Write) -> None:
        """Write this rank's stretches and random state, and on rank 0 the rest; collective."""
        shares = shares_of(self.engine, self.names)
        mine = shares.own(self.rank.rank, self.rank.world_size)
        pieces.write(_pieces(shares, mine), self.rank.rank, sink)
        sink(f"{FOLDER}/random-{self.rank.rank:05d}.safetensors", to_bytes(_random_state()))
        sums, _ = self._checksums(shares, mine)
        steps = [int(step) for step in self.agreement.gather(str(_adam_step(shares)))]
        if self.rank.main:
            summary = {
                "adam_step": max(steps),
                "scheduled": schedule.done(self.engine.lr_scheduler),
                "loss_scale": _loss_scale(self.engine.optimizer),
                "checksums": {key: f"{value:016x}" for key, value in sums.items()},
            }
            sink(_SUMMARY, json.dumps(summary, indent=1).encode())

    def load(self, folder: Path, idle_update: Callable[[], object]) -> None:
        """Restore what any layout saved; collective. `idle_update` makes an update without a single valid label.

        Raises UserError where something is missing, or did not arrive as it was saved.
        """
        summary = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
        source = Pieces(folder, self.rank.rank)
        shares = shares_of(self.engine, self.names)
        for share in shares.all():
            shares.put(share, WEIGHT, source.read(WEIGHT, share.name, share.start, share.numel))
        with _no_step(shares.optimizer):
            idle_update()
        shares = shares_of(self.engine, self.names)  # the moments exist now
        for share in shares.all():
            for kind in shares.kinds(share):
                shares.put(share, kind, source.read(kind, share.name, share.start, share.numel))
        _set_adam_step(shares.optimizer, summary["adam_step"])
        self.engine.global_steps = summary["scheduled"]
        schedule.go_to(self.engine.lr_scheduler, summary["scheduled"])
        _set_loss_scale(self.engine.optimizer, summary["loss_scale"])
        self._verify(shares, summary["checksums"], folder)
        _set_random_state(folder, self.rank)

    def _checksums(self, shares: Shares, which: list[Share]) -> tuple[dict[str, int], dict[str, int]]:
        """`kind:name` → checksum over all ranks' stretches, and how many elements went into it; collective."""
        keys = [f"{kind}:{name}" for kind in (WEIGHT, *_MOMENTS) for name in self.sizes]
        sums, counts = dict.fromkeys(keys, 0), dict.fromkeys(keys, 0)
        for share in which:
            for kind in (WEIGHT, *shares.kinds(share)):
                key = f"{kind}:{share.name}"
                sums[key] += pieces.checksum(shares.get(share, kind), share.start)
                counts[key] += share.numel
        totals = self.agreement.totals([*sums.values(), *counts.values()])
        found = [key for key, count in zip(keys, totals[len(keys) :], strict=True) if count]
        together = dict(zip([*keys, *(f"#{key}" for key in keys)], totals, strict=True))
        return {key: together[key] for key in found}, {key: together[f"#{key}"] for key in found}

    def _verify(self, shares: Shares, expected: Mapping[str, str], folder: Path) -> None:
        """Compare what is in the engine now with what was saved; a replicated tensor counts as often as it is held."""
        sums, counts = self._checksums(shares, shares.all())
        wrong = sorted({*expected} ^ {*sums})
        for key in {*expected} & {*sums}:
            copies, rest = divmod(counts[key], self.sizes[key.partition(":")[2]])
            if rest or sums[key] != int(expected[key], 16) * copies % (1 << 64):
                wrong.append(key)
        if wrong:
            raise UserError(
                f"{len(wrong)} tensors did not arrive in the engine as they were saved",
                "\n".join([str(folder), *wrong[:10]]),
                "remove this checkpoint so that the one before it is taken",
            )


def _pieces(shares: Shares, which: list[Share]) -> Iterator[Piece]:
    for share in which:
        for kind in (WEIGHT, *shares.kinds(share)):
            yield Piece(kind, share.name, share.start, shares.get(share, kind))


class _no_step:  # reads as a statement
    """Within it the optimizer changes no weight: rate and decay are zero."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._groups = optimizer.param_groups

    def __enter__(self) -> None:
        self._kept = [(group["lr"], group["weight_decay"]) for group in self._groups]
        for group in self._groups:
            group["lr"] = group["weight_decay"] = 0.0

    def __exit__(self, *_: object) -> None:
        for group, (rate, decay) in zip(self._groups, self._kept, strict=True):
            group["lr"], group["weight_decay"] = rate, decay


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


def _loss_scale(optimizer: Any) -> dict[str, float]:
    """The numbers of fp16's dynamic loss scale; empty elsewhere."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return {} if scaler is None else {k: v for k, v in vars(scaler).items() if isinstance(v, (int, float))}


def _set_loss_scale(optimizer: Any, numbers: Mapping[str, float]) -> None:
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is not None and numbers.keys() == _loss_scale(optimizer).keys():  # the precision may have changed
        vars(scaler).update(numbers)


def _random_state() -> dict[str, Tensor]:
    """The random state of this rank: the host's, and the device's where there is one."""
    state = {"cpu": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        state["device"] = get_accelerator().get_rng_state().cpu()
    return state


def _set_random_state(folder: Path, rank: Rank) -> None:
    """Restore this rank's random state; a rank that there was not then draws its own from rank 0's."""
    path = folder / FOLDER / f"random-{rank.rank:05d}.safetensors"
    state = load_file(path if path.exists() else folder / FOLDER / "random-00000.safetensors")
    torch.set_rng_state(state["cpu"])
    if "device" in state and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(state["device"])
    if not path.exists():
        torch.manual_seed(torch.initial_seed() + rank.rank)
