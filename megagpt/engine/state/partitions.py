"""Access to the partitions of weights and optimizer states that this rank holds at each ZeRO stage.

DeepSpeed's own accessors return whole tensors to every rank. At stages 1 and 2 they find the moments of the first
parameter group only, because DeepSpeed 0.19.8 links the moments of all groups as soon as the first group has been
stepped (test_with_two_parameter_groups_the_moments_of_the_second_are_not_found). This module finds partitions by the
addresses that DeepSpeed attaches to each parameter (`_hp_mapping`, `ds_tensor`).
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
from megagpt.config.recipe.optimizers import OPTIMIZERS
from megagpt.engine.state.flat_buffers import flat_buffers

MOMENTS = tuple(dict.fromkeys(state for facts in OPTIMIZERS.values() for state in facts.states))
"""names of the optimizer states that checkpoints can contain"""


@dataclass(frozen=True)
class OptimizerPartition:
    """Elements [start, start + numel) of the flattened parameter `name`, and their optimizer states."""

    name: str
    start: int
    numel: int
    parameter: Any  # a torch parameter with additional attributes of DeepSpeed


class OptimizerPartitions(Protocol):
    """Access to the weights and optimizer states that one engine holds on this rank."""

    optimizer: torch.optim.Optimizer

    def all(self) -> list[OptimizerPartition]:
        """Return every partition on this rank."""
        ...

    def own(self, rank: int, world_size: int) -> list[OptimizerPartition]:
        """Return the partitions that this rank saves. Together, the ranks save each element of the model once."""
        ...

    def kinds(self, partition: OptimizerPartition) -> tuple[str, ...]:
        """Return the names of the optimizer states of a partition. There are none before the first update."""
        ...

    def get(self, partition: OptimizerPartition, kind: str) -> Tensor:
        """Return a partition [numel] of the master weight (if `kind` is WEIGHT) or of an optimizer state, in fp32."""
        ...

    def put(self, partition: OptimizerPartition, kind: str, value: Tensor) -> None:
        """Overwrite a partition of the master weight or of an optimizer state with `value` [numel]."""
        ...


def optimizer_partitions(engine: Any, names: Mapping[Any, str]) -> OptimizerPartitions:
    """Return the implementation of `OptimizerPartitions` for the ZeRO stage of a DeepSpeed engine.

    The stage is recognized by the attributes that DeepSpeed has added to the parameters.

    Args:
        engine: The DeepSpeed engine.
        names: The name in `GPT` of each parameter on this rank.
    """
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    parameter = next(iter(names))
    if hasattr(parameter, "ds_id"):
        return _Stage3Partitions(names, inner, engine.optimizer)
    if hasattr(parameter, "_hp_mapping"):
        return _FlatPartitions(names, inner)
    return _Replicated(names, inner)


class _Replicated:
    """Partitions at ZeRO stage 0, where every rank holds all states and saves an equal part of every parameter."""

    def __init__(self, names: Mapping[Any, str], optimizer: torch.optim.Optimizer) -> None:
        self._names = names
        self.optimizer = optimizer

    def all(self) -> list[OptimizerPartition]:
        return self.own(0, 1)

    def own(self, rank: int, world_size: int) -> list[OptimizerPartition]:
        partitions = []
        for parameter, name in self._names.items():
            start = parameter.numel() * rank // world_size
            end = parameter.numel() * (rank + 1) // world_size
            if end > start:
                partitions.append(OptimizerPartition(name, start, end - start, parameter))
        return partitions

    def kinds(self, partition: OptimizerPartition) -> tuple[str, ...]:
        return _states_like(partition.parameter, self.optimizer.state.get(partition.parameter, {}))

    def get(self, partition: OptimizerPartition, kind: str) -> Tensor:
        parameter = partition.parameter
        tensor = parameter if kind == WEIGHT else self.optimizer.state[parameter][kind]
        return tensor.detach().view(-1)[partition.start : partition.start + partition.numel]

    def put(self, partition: OptimizerPartition, kind: str, value: Tensor) -> None:
        self.get(partition, kind).copy_(value)


class _FlatPartitions:
    """Partitions of ZeRO stages 1 and 2 and of DeepSpeed's bf16 optimizer, which are ranges of flat buffers."""

    def __init__(self, names: Mapping[Any, str], optimizer: torch.optim.Optimizer) -> None:
        self._names = names
        self.optimizer = optimizer

    def all(self) -> list[OptimizerPartition]:
        partitions = []
        for parameter, name in self._names.items():
            mapping = parameter._hp_mapping
            if mapping is not None and mapping.lp_fragment_address.numel:
                address = mapping.lp_fragment_address
                partitions.append(OptimizerPartition(name, address.start, address.numel, parameter))
        return partitions

    def own(self, rank: int, world_size: int) -> list[OptimizerPartition]:
        return self.all()

    def kinds(self, partition: OptimizerPartition) -> tuple[str, ...]:
        buffer = self._buffer(partition)
        return _states_like(buffer, self.optimizer.state.get(buffer, {}))

    def get(self, partition: OptimizerPartition, kind: str) -> Tensor:
        buffer = self._buffer(partition)
        tensor = buffer if kind == WEIGHT else self.optimizer.state[buffer][kind]
        offset = partition.parameter._hp_mapping.hp_fragment_address.start
        return tensor.detach().narrow(0, offset, partition.numel)

    def put(self, partition: OptimizerPartition, kind: str, value: Tensor) -> None:
        self.get(partition, kind).copy_(value)

    def _buffer(self, partition: OptimizerPartition) -> Tensor:
        """Return this rank's range of the flat fp32 buffer that contains the parameter."""
        index = partition.parameter._hp_mapping.param_group_index
        buffer: Tensor = self.optimizer.param_groups[index]["params"][0]
        return buffer


class _Stage3Partitions:
    """Partitions at ZeRO stage 3, where each rank holds an equal, padded part of every parameter, possibly on NVMe."""

    def __init__(self, names: Mapping[Any, str], optimizer: torch.optim.Optimizer, wrapper: Any) -> None:
        self._names = names
        self.optimizer = optimizer
        self._buffers = {
            parameter: buffer.partition for buffer in flat_buffers(wrapper) for parameter in buffer.parameters
        }

    def all(self) -> list[OptimizerPartition]:
        partitions = []
        for parameter, name in self._names.items():
            length = parameter.ds_tensor.ds_numel
            start = torch.distributed.get_rank(parameter.ds_process_group) * length
            numel = min(length, parameter.ds_numel - start)
            if numel > 0:
                partitions.append(OptimizerPartition(name, start, numel, parameter))
        return partitions

    def own(self, rank: int, world_size: int) -> list[OptimizerPartition]:
        return self.all()

    def kinds(self, partition: OptimizerPartition) -> tuple[str, ...]:
        # The states are found by name and not by shape, because tensors that are on NVMe have no shape.
        state = self.optimizer.state.get(self._buffers[partition.parameter], {})
        return tuple(kind for kind in MOMENTS if kind in state)

    def get(self, partition: OptimizerPartition, kind: str) -> Tensor:
        return self._padded(partition, kind).detach()[: partition.numel]

    def put(self, partition: OptimizerPartition, kind: str, value: Tensor) -> None:
        padded = self._padded(partition, kind).clone()
        padded[: partition.numel].copy_(value)
        if kind == WEIGHT:
            safe_set_local_fp32_param(partition.parameter, padded)
        else:
            safe_set_local_optimizer_state(partition.parameter, padded, kind)

    def _padded(self, partition: OptimizerPartition, kind: str) -> Tensor:
        """Return this rank's part of the tensor including its padding."""
        if kind == WEIGHT:
            tensor: Tensor = safe_get_local_fp32_param(partition.parameter)
        else:
            tensor = safe_get_local_optimizer_state(partition.parameter, kind)
        return tensor


def _states_like(parameter: Tensor, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the optimizer states that have the same shape as the parameter."""
    return tuple(key for key, value in state.items() if torch.is_tensor(value) and value.shape == parameter.shape)
