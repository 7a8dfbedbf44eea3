"""The model of a recipe with its initial weights, where the layout keeps it: the same bits on every layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from megagpt.config.recipe import Recipe
from megagpt.engine import deepspeed_ops, devices
from megagpt.errors import UserError
from megagpt.model.gpt import GPT, initial_value, initialize
from megagpt.model.layers import Block
from megagpt.model.parallel import ParallelLayers

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_device(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Raises UserError where this device cannot do what recipe and config ask for."""
    precision = recipe.precision or "fp32"
    if not devices.computes(precision):
        raise UserError(
            f"this device ({devices.name()}) has no units for {precision}",
            f"{recipe.location('precision')}  precision".strip(),
            f"set precision to {'fp16' if precision == 'bf16' else 'bf16'} or fp32",
        )
    quantized = [key for key, on in config.get("zero_optimization", {}).items() if on and "zero_quantized_" in key]
    if not quantized:
        return
    if deepspeed_ops.device() == "cpu":
        raise UserError("a CPU does not quantize ZeRO's traffic", f"zero_optimization.{quantized[0]}", "take it away")
    try:
        deepspeed_ops.load("quantizer")
    except Exception as error:
        raise UserError(
            "ZeRO's quantized traffic needs DeepSpeed's operator quantizer, which cannot be built here",
            f"zero_optimization.{quantized[0]}\n{str(error).strip().splitlines()[0]}",
            "install nvcc of the CUDA that torch is built for, and export CUDA_HOME, or take the quantized keys away",
        ) from error


def materialise(recipe: Recipe, config: Mapping[str, Any], zero_stage: int, parallel: ParallelLayers) -> GPT:
    """A GPT in the recipe's precision, on this rank's device; at ZeRO stage 3 only this rank's share of it.

    Masters in fp32 are made from these weights later, so that in low precision they start at rounded values.
    """
    if zero_stage == 3:
        return _sharded(recipe, config, parallel)
    dtype = _DTYPES[recipe.precision or "fp32"]
    with torch.device("meta"):  # no memory and no time for the values that the layers would draw
        model = GPT(recipe.model, recipe.document_end, parallel)
    model.to(dtype).to_empty(device=get_accelerator().current_device_name())
    initialize(model, recipe.seed)
    return model


def recompute(layers: Iterable[nn.Module], number: int, on_host: bool) -> None:
    """Let `number` of the blocks, spread evenly, compute their activations again in the backward pass."""
    blocks = [layer for layer in layers if isinstance(layer, Block)]
    for index, block in enumerate(blocks):
        if (index + 1) * number // len(blocks) > index * number // len(blocks):
            block.recompute = "from host" if on_host else "yes"


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter before ZeRO stage 3 sharded it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


@torch.no_grad()
def _sharded(recipe: Recipe, config: Mapping[str, Any], parallel: ParallelLayers) -> GPT:
    """Each parameter is split as soon as its layer makes it, and gathered alone to be given its value.

    Precision comes from the config: a dtype that is given, DeepSpeed takes for bf16 on devices without fp16.
    """
    with deepspeed.zero.Init(config_dict_or_path=dict(config)):
        model = GPT(recipe.model, recipe.document_end, parallel)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                parameter.copy_(initial_value(name, parameter.shape, recipe.model, recipe.seed))
    return model
