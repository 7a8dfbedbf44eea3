"""Build the model with its initial weights, which are bitwise identical on every layout."""

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
    """Check that this rank's device supports the configured precision and quantized communication.

    Args:
        recipe: The recipe, which sets the precision.
        config: The resolved DeepSpeed config, which may enable quantized communication.

    Raises:
        UserError: If the device does not support one of them, or if a required operator cannot be built.
    """
    precision = recipe.precision or "fp32"
    if not devices.supports_precision(precision):
        raise UserError(
            f"this device ({devices.device_name()}) does not support {precision}",
            f"{recipe.location('precision')}  precision".strip(),
            f"set precision to {'fp16' if precision == 'bf16' else 'bf16'} or fp32",
        )
    quantized = [key for key, on in config.get("zero_optimization", {}).items() if on and "zero_quantized_" in key]
    if not quantized:
        return
    key = f"zero_optimization.{quantized[0]}"
    if deepspeed_ops.device() == "cpu":
        raise UserError("quantized communication of ZeRO is not supported on CPUs", key, "remove this key")
    try:
        deepspeed_ops.load("quantizer")
    except Exception as error:
        raise UserError(
            "quantized communication of ZeRO needs DeepSpeed's operator quantizer, which cannot be built here",
            f"{key}\n{str(error).strip().splitlines()[0]}",
            "install nvcc of torch's CUDA version and export CUDA_HOME, or remove the quantized keys",
        ) from error


def init_model(recipe: Recipe, config: Mapping[str, Any], zero_stage: int, parallel: ParallelLayers) -> GPT:
    """Build a GPT in the recipe's precision on this rank's device. At ZeRO stage 3, build only this rank's partition.

    The fp32 master weights are copied from these weights, so in low precision they start at rounded values.

    Args:
        recipe: The recipe with the model and the seed.
        config: The config for deepspeed.initialize.
        zero_stage: The ZeRO stage.
        parallel: Settings of the layers for sequence parallelism.

    Returns:
        The model.
    """
    if zero_stage == 3:
        return _init_partitioned(recipe, config, parallel)
    dtype = _DTYPES[recipe.precision or "fp32"]
    with torch.device("meta"):  # avoids the memory and the time of the layers' default initialization
        model = GPT(recipe.model, recipe.document_end, parallel)
    model.to(dtype).to_empty(device=get_accelerator().current_device_name())
    initialize(model, recipe.seed)
    return model


def recompute(layers: Iterable[nn.Module], number: int, on_host: bool) -> None:
    """Make some of the blocks, spread evenly over the model, recompute their activations in the backward pass.

    Args:
        layers: The layers of the model.
        number: Number of blocks that recompute their activations.
        on_host: Whether the inputs of these blocks are kept in host memory.
    """
    blocks = [layer for layer in layers if isinstance(layer, Block)]
    for index, block in enumerate(blocks):
        if (index + 1) * number // len(blocks) > index * number // len(blocks):
            block.recompute = "from host" if on_host else "yes"


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter, even if ZeRO stage 3 has partitioned it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


@torch.no_grad()
def _init_partitioned(recipe: Recipe, config: Mapping[str, Any], parallel: ParallelLayers) -> GPT:
    """Build a model whose parameters are partitioned as soon as their layer has created them.

    The parameters are then gathered one at a time and set to their initial values. The precision is read from the
    config, because on devices without fp16 zero.Init interprets every explicit dtype as bf16
    (runtime/zero/partition_parameters.py:409; test_a_dtype_given_to_zero_init_is_taken_for_bf16_without_fp16).
    """
    with deepspeed.zero.Init(config_dict_or_path=dict(config)):
        model = GPT(recipe.model, recipe.document_end, parallel)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                parameter.copy_(initial_value(name, parameter.shape, recipe.model, recipe.seed))
    return model
