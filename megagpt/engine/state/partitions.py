"""Which stretches of weights and optimizer states lie on this rank, at each ZeRO stage, and access to them.

DeepSpeed's own accessors give whole tensors to every rank, and at stages 1 and 2 find the moments of the first
parameter group only (0.19.8: it links them after the first group's step). These go by its addresses instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from megagpt.checkpoint.tensor_files import WEIGHT
from megagpt.engine.state.flat_buffers import flats

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True)
class Share:
    """Elements [start, start + numel) of the flattened parameter `name`."""

    name: str
    start: int
    numel: int
    parameter: Any  # torch's, with what DeepSpeed hangs on it


class Shares(Protocol):
    """What one engine holds on this rank: `all` of it, and its `own` part where ranks hold the same."""

    optimizer: torch.optim.Optimizer

    def all(self) -> list[Share]:
        """Every stretch on this rank."""
        ...

    def own(self, rank: int, world_size: int) -> list[Share]:
        """Stretches that this rank saves: those of all ranks together are the model, each element once."""
        ...

    def kinds(self, share: Share) -> tuple[str, ...]:
        """Names of the optimizer states; none before the first update."""
        ...

    def get(self, share: Share, kind: str) -> Tensor:
        """The stretch `[numel]` in fp32: the weight's master, or an optimizer state."""
        ...

    def put(self, share: Share, kind: str, value: Tensor) -> None:
        """Overwrite the stretch by `value` `[numel]`."""
        ...


def shares_of(engine: Any, names: Mapping[Any, str]) -> Shares:
    """The access that fits an engine: by how its parameters are marked."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    one = next(iter(names))
    if hasattr(one, "ds_id"):
        return _Partitioned(names, inner, engine.optimizer)
    if hasattr(one, "_hp_mapping"):
        return _Flat(names, inner)
    return _Whole(names, inner)


class _Whole:
    """ZeRO stage 0: every rank holds everything; each saves an even part of every parameter."""

    def __init__(self, names: Mapping[Any, str], optimizer: torch.optim.Optimizer) -> None:
        self._names, self.optimizer = names, optimizer

    def all(self) -> list[Share]:
        return self.own(0, 1)

    def own(self, rank: int, world_size: int) -> list[Share]:
        shares = []
        for parameter, name in self._names.items():
            start, end = (parameter.numel() * place // world_size for place in (rank, rank + 1))
            shares += [Share(name, start, end - start, parameter)] if end > start else []
        return shares

    def kinds(self, share: Share) -> tuple[str, ...]:
        return _like(self.optimizer.state.get(share.parameter, {}), share.parameter)

    def get(self, share: Share, kind: str) -> Tensor:
        held = share.parameter if kind == WEIGHT else self.optimizer.state[share.parameter][kind]
        return held.detach().view(-1)[share.start : share.start + share.numel]

    def put(self, share: Share, kind: str, value: Tensor) -> None:
        self.get(share, kind).copy_(value)


class _Flat:
    """ZeRO stages 1 and 2, and DeepSpeed's bf16 optimizer: a stretch of a flat group for each parameter on it."""

    def __init__(self, names: Mapping[Any, str], optimizer: torch.optim.Optimizer) -> None:
        self._names, self.optimizer = names, optimizer

    def all(self) -> list[Share]:
        return [
            Share(name, place.start, place.numel, parameter)
            for parameter, name in self._names.items()
            if (mapping := parameter._hp_mapping) is not None and (place := mapping.lp_fragment_address).numel
        ]

    def own(self, rank: int, world_size: int) -> list[Share]:
        return self.all()

    def kinds(self, share: Share) -> tuple[str, ...]:
        flat = self._group(share)
        return _like(self.optimizer.state.get(flat, {}), flat)

    def get(self, share: Share, kind: str) -> Tensor:
        flat = self._group(share)
        held = flat if kind == WEIGHT else self.optimizer.state[flat][kind]
        return held.detach().narrow(0, share.parameter._hp_mapping.hp_fragment_address.start, share.numel)

    def put(self, share: Share, kind: str, value: Tensor) -> None:
        self.get(share, kind).copy_(value)

    def _group(self, share: Share) -> Tensor:
        """This rank's part of the flat fp32 group that the parameter is in."""
        index = share.parameter._hp_mapping.param_group_index
        flat: Tensor = self.optimizer.param_groups[index]["params"][0]
        return flat


class _Partitioned:
    """ZeRO stage 3: each rank holds one even, padded part of every parameter; it may be swapped out to NVMe."""

    def __init__(self, names: Mapping[Any, str], optimizer: torch.optim.Optimizer, wrapper: Any) -> None:
        self._names, self.optimizer = names, optimizer
        self._flats = {parameter: flat.stretch for flat in flats(wrapper) for parameter in flat.parameters}

    def all(self) -> list[Share]:
        shares = []
        for parameter, name in self._names.items():
            length = parameter.ds_tensor.ds_numel
            start = torch.distributed.get_rank(parameter.ds_process_group) * length
            numel = min(length, parameter.ds_numel - start)
            shares += [Share(name, start, numel, parameter)] if numel > 0 else []
        return shares

    def own(self, rank: int, world_size: int) -> list[Share]:
        return self.all()

    def kinds(self, share: Share) -> tuple[str, ...]:
        # by name: what is swapped out has no shape
        return tuple(kind for kind in MOMENTS if kind in self.optimizer.state.get(self._flats[share.parameter], {}))

    def get(self, share: Share, kind: str) -> Tensor:
        held = self._padded(share, kind)
        return held.detach()[: share.numel]

    def put(self, share: Share, kind: str, value: Tensor) -> None:
        padded = self._padded(share, kind).clone()
        padded[: share.numel].copy_(value)
        if kind == WEIGHT:
            safe_set_local_fp32_param(share.parameter, padded)
        else:
            safe_set_local_optimizer_state(share.parameter, padded, kind)

    def _padded(self, share: Share, kind: str) -> Tensor:
        held: Tensor = (
            safe_get_local_fp32_param(share.parameter)
            if kind == WEIGHT
            else safe_get_local_optimizer_state(share.parameter, kind)
        )
        return held


def _like(state: Mapping[str, Any], parameter: Tensor) -> tuple[str, ...]:
    return tuple(key for key, value in state.items() if torch.is_tensor(value) and value.shape == parameter.shape)
