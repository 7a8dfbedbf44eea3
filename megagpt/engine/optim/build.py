"""Build the optimizer of a recipe: Muon, or AdamW in DeepSpeed's fused version on GPUs and torch's version on CPUs.

To add an optimizer, see the table in config/recipe/optimizers.py, which also lists what else has to be changed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megagpt.config.recipe import ModelSection
from megagpt.config.recipe.sections import OptimizerSection
from megagpt.engine import deepspeed_ops
from megagpt.engine.init_model import whole_shape
from megagpt.engine.optim.muon import Muon
from megagpt.engine.optim.muon_all_to_all import Matrix, MuonAllToAll
from megagpt.engine.parallel.tensor import TensorParallelGroup
from megagpt.engine.state.flat_buffers import flat_buffers
from megagpt.model.attention import Attention
from megagpt.model.layers import MLP
from megagpt.model.sharding import shard_spec

log = logging.getLogger(__name__)


def build(section: OptimizerSection, model: nn.Module, *, on_gpu: bool) -> torch.optim.Optimizer:
    """Build AdamW or Muon. Weight decay applies to matrices, but not to normalization weights and biases.

    Args:
        section: The optimizer section of the recipe.
        model: The model. The names and shapes of its parameters determine the parameter groups.
        on_gpu: Whether the optimizer's step runs on a GPU.

    Returns:
        The optimizer.
    """
    groups = _parameter_groups(section, model)
    adamw: dict[str, Any] = {"betas": tuple(section.betas), "eps": section.eps}
    if section.type == "muon":
        assert section.muon_momentum is not None  # the recipe has been checked for this
        return Muon(groups, section.muon_momentum, fused=True, **adamw)
    if on_gpu and (fused := _deepspeed_fused_adam()) is not None:
        return fused(groups, adam_w_mode=True, **adamw)
    return torch.optim.AdamW(groups, fused=True, **adamw)


def attach_muon_plans(
    engine: Any, names: Mapping[Any, str], section: ModelSection, tensor_parallel: TensorParallelGroup
) -> None:
    """Attach the plans that reassemble the matrices of the engine's flat buffers to Muon. Does nothing for AdamW.

    Args:
        engine: The DeepSpeed engine.
        names: The name in `GPT` of each parameter.
        section: The model section of the recipe.
        tensor_parallel: The tensor-parallel group of this rank.
    """
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if not isinstance(inner, Muon):
        return
    for buffer in flat_buffers(engine.optimizer):
        if inner.param_groups[buffer.param_group]["muon"]:
            matrices = [
                Matrix(whole_shape(parameter), shard_spec(names[parameter], section, tensor_parallel.degree))
                for parameter in buffer.parameters
            ]
            plan = MuonAllToAll(matrices, buffer.fragments(), buffer.group, tensor_parallel, engine.device)
            inner.all_to_all_plans[buffer.partition] = plan


def _parameter_groups(section: OptimizerSection, model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameter groups.

    The groups that AdamW updates come first, because the learning rate of the first group is logged.
    """
    decay: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    qkv: list[torch.nn.Parameter] = []
    matrices: list[torch.nn.Parameter] = []
    block_matrices = _block_matrices(model) if section.type == "muon" else {}
    for name, parameter in model.named_parameters():
        if name in block_matrices:
            (qkv if block_matrices[name] > 1 else matrices).append(parameter)
        else:
            (decay if len(whole_shape(parameter)) >= 2 else rest).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decay, "lr": section.lr, "weight_decay": section.weight_decay},
        {"params": rest, "lr": section.lr, "weight_decay": 0.0},
    ]
    if section.type == "muon":
        shared = {"lr": section.muon_lr, "weight_decay": section.weight_decay, "muon": True}
        parts = max(block_matrices.values(), default=1)  # a pipeline stage may have no block
        groups += [{"params": qkv, "parts": parts, **shared}, {"params": matrices, "parts": 1, **shared}]
    return [group for group in groups if group["params"]]


def _block_matrices(model: nn.Module) -> dict[str, int]:
    """Return, for the name of each matrix in the transformer blocks, the number of parts that Muon updates separately.

    The parts are equal slices of the rows. A fused qkv matrix has `group` parts for the queries, one for the keys and
    one for the values. Every other matrix is a single part.
    """
    parts = {}
    for name, module in model.named_modules():
        if isinstance(module, (Attention, MLP)):
            for part, weight in module.named_parameters(prefix=name):
                if len(whole_shape(weight)) == 2:
                    parts[part] = module.group + 2 if isinstance(module, Attention) and ".qkv." in part else 1
    return parts


def _deepspeed_fused_adam() -> Any:
    """Return DeepSpeed's FusedAdam, or None with a warning if its operator cannot be built here."""
    from deepspeed.ops.adam import FusedAdam

    try:
        deepspeed_ops.load("fused_adam")
    except Exception as error:
        # The build fails if nvcc, the C++ compiler or a header is missing. torch's fused AdamW needs none of them.
        log.warning("DeepSpeed's fused Adam cannot be built (%s); using torch's fused AdamW instead", error)
        return None
    return FusedAdam
