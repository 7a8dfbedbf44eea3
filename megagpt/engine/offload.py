"""What lies outside the device: parameters and optimizer on the host or on NVMe."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.recipe import ModelSection

_BUFFERS = 16  # of parameters read ahead: a layer's own, and those of the next block


def offloaded(config: Mapping[str, Any], what: str) -> str:
    """Where the "param" or "optimizer" lies: cpu, nvme, or none if it stays on the device."""
    section = config.get("zero_optimization", {}).get(f"offload_{what}") or {}
    return str(section.get("device") or "none")


def ready(config: Mapping[str, Any], section: ModelSection, ranks: int) -> dict[str, Any]:
    """The config with buffers that fit the model, where it names NVMe and no sizes.

    DeepSpeed's default buffers are a gigabyte for any model, and too small for a large embedding on few ranks.
    Raises UserError where NVMe cannot be reached from here.
    """
    filled = copy.deepcopy(dict(config))
    if "nvme" in (offloaded(config, "param"), offloaded(config, "optimizer")):
        _check_operator()
    if offloaded(config, "param") == "nvme":
        with torch.device("meta"):
            largest = max(parameter.numel() for parameter in GPT(section).parameters())
        parameters = filled["zero_optimization"]["offload_param"]
        parameters.setdefault("buffer_size", -(-largest // ranks))
        parameters.setdefault("buffer_count", _BUFFERS)
    return filled


def _check_operator() -> None:
    """Build or load DeepSpeed's asynchronous I/O now, and say what is missing if that fails."""
    try:
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:
        raise UserError(
            "offload to NVMe needs DeepSpeed's operator async_io, which cannot be built here",
            str(error).strip().splitlines()[0],
            "install libaio's headers (Debian: libaio-dev) and a C++ compiler, or offload to cpu",
        ) from error
