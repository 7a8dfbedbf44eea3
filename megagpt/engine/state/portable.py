"""Save and restore the state of an engine in checkpoints that do not depend on the layout.

The checkpoints contain partitions of weights and moments under the name of the parameter, and the same code handles
every layout. The state is restored in three steps, in the only order that works at all ZeRO stages. The first step
restores the master weights. The second step runs an update with a zero gradient and a zero learning rate, in which
DeepSpeed creates the moments and copies the master weights to all replicas of the model's weights. The third step
restores the moments and the step count. Finally, the checksums of all tensors in the engine are compared with the saved
ones.
"""

from __future__ import annotations

import contextlib
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
from megagpt.engine.state.partitions import MOMENTS, OptimizerPartition, OptimizerPartitions, optimizer_partitions
from megagpt.engine.state.rng_and_loss_scale import rng_state, set_rng_state
from megagpt.errors import UserError
from megagpt.files import WriteFile, parse_json
from megagpt.model.gpt import GPT
from megagpt.model.sharding import shard_spec

_SUMMARY = f"{FOLDER}/state.json"


@dataclass(frozen=True)
class PortableState:
    """State of one DeepSpeed engine, which can be saved and restored.

    Attributes:
        engine: The DeepSpeed engine.
        names: The name in `GPT` of each parameter on this rank.
        section: The model section of the recipe.
        layout: The layout of the engine.
        rank: This rank.
        collectives: The collectives of the job.
        saved_elsewhere: Names of parameters that another pipeline stage saves.
    """

    engine: Any
    names: Mapping[torch.nn.Parameter, str]
    section: ModelSection
    layout: Layout
    rank: Rank
    collectives: Collectives
    saved_elsewhere: frozenset[str] = frozenset()

    def save(self, sink: WriteFile) -> None:
        """Write this rank's partitions and RNG state, and on rank 0 all state that is not a tensor. Collective."""
        partitions = optimizer_partitions(self.engine, self.names)
        own = self._own(partitions)
        tensor_files.write_slices(self._slices(partitions, own), self.rank.rank, sink)
        replica, index = divmod(self.rank.rank, self.layout.tensor_parallel)
        if index == 0:  # tensor-parallel ranks have the same RNG state
            sink(_rng_file(replica), to_bytes(rng_state()))
        checksums, _ = self._checksums(partitions, own)
        steps = self.collectives.all_gather_object(_adam_step(partitions))
        if self.rank.main:
            summary = {
                "adam_step": max(steps),
                "scheduled": lr_schedule.completed_updates(self.engine.lr_scheduler),
                "loss_scale": loss_scale.state_dict(self.engine.optimizer),
                "checksums": {key: f"{value:016x}" for key, value in checksums.items()},
            }
            sink(_SUMMARY, json.dumps(summary, indent=1).encode())

    def load(self, folder: Path, empty_update: Callable[[], object]) -> None:
        """Restore the state from a checkpoint that was saved with any layout. Collective.

        Args:
            folder: The folder of the checkpoint.
            empty_update: Function that runs an update without valid labels.

        Raises:
            UserError: If the checkpoint is incomplete, or if the restored state differs from the saved one.
        """
        summary = _read_summary(folder / _SUMMARY)
        files = TensorFiles(folder, self.rank.rank)
        partitions = optimizer_partitions(self.engine, self.names)
        for partition in partitions.all():
            partitions.put(partition, WEIGHT, self._read(files, partition, WEIGHT))
        with _frozen_weights(partitions.optimizer, self.names):
            empty_update()
        partitions = optimizer_partitions(self.engine, self.names)  # the empty update has created the moments
        for partition in partitions.all():
            for kind in partitions.kinds(partition):
                partitions.put(partition, kind, self._read(files, partition, kind))
        _set_adam_step(partitions.optimizer, summary["adam_step"])
        self.engine.global_steps = summary["scheduled"]
        lr_schedule.set_completed_updates(self.engine.lr_scheduler, summary["scheduled"])
        loss_scale.load_state_dict(self.engine.optimizer, summary["loss_scale"])
        self._verify(partitions, summary["checksums"], folder)
        _restore_rng_state(folder, self.rank.rank // self.layout.tensor_parallel)

    def _own(self, partitions: OptimizerPartitions) -> list[OptimizerPartition]:
        """Return the partitions that this rank saves. Each element of the model is saved by exactly one rank."""
        replica = self.rank.rank // self.layout.tensor_parallel % self.layout.zero_partitions
        first = self.rank.rank % self.layout.tensor_parallel == 0
        return [
            partition
            for partition in partitions.own(replica, self.layout.zero_partitions)
            if partition.name not in self.saved_elsewhere and (first or self._shard(partition.name).degree > 1)
        ]

    def _shard(self, name: str) -> ShardIndex:
        """Return the index of the tensor-parallel shard of a parameter that this rank holds."""
        degree = self.layout.tensor_parallel
        if shard_spec(name, self.section, degree) is None:
            return ShardIndex()
        return ShardIndex(self.rank.rank % degree, degree)

    def _slices(self, partitions: OptimizerPartitions, which: list[OptimizerPartition]) -> Iterator[TensorSlice]:
        for partition in which:
            shard = self._shard(partition.name)
            for kind in (WEIGHT, *partitions.kinds(partition)):
                tensor = partitions.get(partition, kind)
                yield TensorSlice(kind, partition.name, partition.start, tensor, shard)

    def _read(self, files: TensorFiles, partition: OptimizerPartition, kind: str) -> Tensor:
        """Read a partition from the checkpoint. The whole tensor is read only if the tensor-parallel degree differs."""
        shard = self._shard(partition.name)
        if files.degree(partition.name) == shard.degree:
            return files.read(kind, partition.name, partition.start, partition.numel, shard)
        whole = files.read_whole(kind, partition.name, self._shapes()[partition.name], self.section)
        return self._range_of(whole, partition)

    def _range_of(self, whole: Tensor, partition: OptimizerPartition) -> Tensor:
        """Return the elements of a partition from the whole tensor."""
        shard = self._shard(partition.name)
        spec = shard_spec(partition.name, self.section, shard.degree)
        local = whole if spec is None else spec.shard(whole, shard.number, shard.degree)
        return local.reshape(-1)[partition.start : partition.start + partition.numel]

    def _shapes(self) -> dict[str, torch.Size]:
        """Return the whole shape of every parameter of the model by name, including those that other ranks hold."""
        with torch.device("meta"):
            return {name: parameter.shape for name, parameter in GPT(self.section).named_parameters()}

    def _checksums(
        self, partitions: OptimizerPartitions, which: list[OptimizerPartition]
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Return the checksum and the number of elements of each tensor over all ranks, by `kind:name`. Collective."""
        shapes = self._shapes()
        keys = [f"{kind}:{name}" for kind in (WEIGHT, *MOMENTS) for name in shapes]
        checksums = dict.fromkeys(keys, 0)
        counts = dict.fromkeys(keys, 0)
        for partition in which:
            positions: Tensor | int = partition.start
            if self._shard(partition.name).degree > 1:
                shape = shapes[partition.name]
                positions = self._range_of(torch.arange(shape.numel()).view(shape), partition)
            for kind in (WEIGHT, *partitions.kinds(partition)):
                key = f"{kind}:{partition.name}"
                checksums[key] += tensor_files.checksum(partitions.get(partition, kind), positions)
                counts[key] += partition.numel
        totals = self.collectives.all_reduce_sum_integers([*checksums.values(), *counts.values()])
        checksums = dict(zip(keys, totals[: len(keys)], strict=True))
        counts = dict(zip(keys, totals[len(keys) :], strict=True))
        return {key: checksums[key] for key in keys if counts[key]}, counts

    def _verify(self, partitions: OptimizerPartitions, expected: Mapping[str, str], folder: Path) -> None:
        """Raise UserError if the state of the engine does not match the saved checksums.

        A replicated tensor contributes to its checksum once per replica, so the saved checksum is multiplied by the
        number of replicas.
        """
        checksums, counts = self._checksums(partitions, partitions.all())
        shapes = self._shapes()
        wrong = sorted({*expected} ^ {*checksums})
        for key in {*expected} & {*checksums}:
            replicas, rest = divmod(counts[key], shapes[key.partition(":")[2]].numel())
            if rest or checksums[key] != int(expected[key], 16) * replicas % (1 << 64):
                wrong.append(key)
        if wrong:
            raise UserError(
                f"{len(wrong)} tensors in the engine differ from those that were saved",
                "\n".join([str(folder), *wrong[:10]]),
                "remove this checkpoint, so that the one before it is used",
            )


@contextlib.contextmanager
def _frozen_weights(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Return a context in which the optimizer changes no weight.

    The learning rate, the weight decay and all gradients are zero in this context.
    """
    saved = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    # Weights that are not finite would cause gradients that are not finite, even without valid labels, and DeepSpeed
    # would then skip the step.
    hooks = [parameter.register_hook(torch.zeros_like) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for group, (lr, weight_decay) in zip(optimizer.param_groups, saved, strict=True):
            group["lr"] = lr
            group["weight_decay"] = weight_decay


def _read_summary(path: Path) -> dict[str, Any]:
    """Return the content of the file with all state that is not a tensor. Raises UserError if the file is damaged."""
    try:
        summary = dict(parse_json(path.read_text(encoding="utf-8")))
        if missing := {"adam_step", "scheduled", "loss_scale", "checksums"} - summary.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, TypeError) as error:
        do = "remove this checkpoint so that the one before it is used"
        raise UserError(f"the state of the optimizer cannot be read: {error}", str(path), do) from None
    return summary


def _adam_step(partitions: OptimizerPartitions) -> int:
    """Return the step count of AdamW, which its bias correction needs, or 0 if this rank has no state of AdamW."""
    steps = [int(state["step"]) for state in partitions.optimizer.state.values() if "step" in state]
    return max(steps, default=0)


def _set_adam_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].fill_(step)
        elif "step" in state:
            state["step"] = step


def _rng_file(replica: int) -> str:
    return f"{FOLDER}/random-{replica:05d}.safetensors"


def _restore_rng_state(folder: Path, replica: int) -> None:
    """Restore the RNG state of this replica. If none was saved, derive a new state from that of the first replica."""
    path = folder / _rng_file(replica)
    set_rng_state(load_file(path if path.exists() else folder / _rng_file(0)))
    if not path.exists():
        torch.manual_seed(torch.initial_seed() + replica)
