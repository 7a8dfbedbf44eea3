"""The optimizer of a recipe, over a GPT's parameters: DeepSpeed's fused Adam on GPUs, torch's on CPUs; or Muon."""

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
from megagpt.engine.optim.muon_all_to_all import Exchange, Matrix
from megagpt.engine.parallel.tensor import Parts
from megagpt.engine.state.flat_buffers import flats
from megagpt.model.attention import Attention
from megagpt.model.layers import MLP
from megagpt.model.sharding import shard_spec

log = logging.getLogger(__name__)


def build(section: OptimizerSection, model: nn.Module, *, on_gpu: bool) -> torch.optim.Optimizer:
    """AdamW or Muon over parameter groups: matrices decay, vectors (norms, biases) do not. `on_gpu`: it steps there."""
    groups = _groups(section, model)
    adamw: dict[str, Any] = {"betas": tuple(section.betas), "eps": section.eps}
    if section.type == "muon":
        assert section.muon_momentum is not None  # the recipe has checked it
        return Muon(groups, section.muon_momentum, fused=True, **adamw)
    if on_gpu and (fused := _deepspeed_fused_adam()) is not None:
        return fused(groups, adam_w_mode=True, **adamw)
    return torch.optim.AdamW(groups, fused=True, **adamw)


def connect(engine: Any, names: Mapping[Any, str], section: ModelSection, parts: Parts) -> None:
    """Tell Muon how the matrices in a DeepSpeed engine's flat tensors are made whole; nothing for other optimizers.

    `names` gives the engine's parameters their names in `GPT`.
    """
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if not isinstance(inner, Muon):
        return
    for flat in flats(engine.optimizer):
        if inner.param_groups[flat.number]["muon"]:
            matrices = [Matrix(whole_shape(p), shard_spec(names[p], section, parts.degree)) for p in flat.parameters]
            inner.exchanges[flat.stretch] = Exchange(matrices, flat.fragments(), flat.group, parts, engine.device)


def _groups(section: OptimizerSection, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups, AdamW's first: its rate is the one that is logged."""
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
        parts = max(block_matrices.values(), default=1)  # a stage of a pipeline may have no block
        groups += [{"params": qkv, "parts": parts, **shared}, {"params": matrices, "parts": 1, **shared}]
    return [group for group in groups if group["params"]]


def _block_matrices(model: nn.Module) -> dict[str, int]:
    """Names of the blocks' matrices, and into how many equal blocks of rows each is cut for Muon.

    A fused qkv holds `group` query blocks, one of keys and one of values, all with the rows of the key heads.
    """
    parts = {}
    for name, module in model.named_modules():
        if isinstance(module, (Attention, MLP)):
            for part, weight in module.named_parameters(prefix=name):
                if len(whole_shape(weight)) == 2:
                    parts[part] = module.group + 2 if isinstance(module, Attention) and ".qkv." in part else 1
    return parts


def _deepspeed_fused_adam() -> Any:
    """DeepSpeed's FusedAdam if its operator can be built here, else None (said in the log)."""
    from deepspeed.ops.adam import FusedAdam

    try:
        deepspeed_ops.load("fused_adam")
    except Exception as error:  # a missing nvcc, compiler or header: torch's own fused kernel needs none
        log.warning("DeepSpeed's fused Adam cannot be built (%s); torch's fused AdamW takes its place", error)
        return None
    return FusedAdam
