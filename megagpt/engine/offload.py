"""Offloading of parameters and optimizer states to host memory or NVMe."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megagpt.config.recipe import Recipe
from megagpt.engine import deepspeed_ops
from megagpt.errors import UserError
from megagpt.model.gpt import GPT

# DeepSpeed chooses these names for its folders on NVMe.
_SWAP_FOLDERS = ("optimizer", "float32params", "bfloat16params", "float16params")
# Number of buffers for parameters that are read ahead. They hold the parameters of two blocks.
_PARAMETER_BUFFERS = 16


def offload_device(config: Mapping[str, Any], what: str) -> str:
    """Return the device to which `what` ("param" or "optimizer") is offloaded: "cpu", "nvme" or "none"."""
    section = config.get("zero_optimization", {}).get(f"offload_{what}") or {}
    return str(section.get("device") or "none")


def steps_on_gpu(config: Mapping[str, Any]) -> bool:
    """Return whether the optimizer's step runs on a GPU or another accelerator instead of on the host."""
    return deepspeed_ops.device() != "cpu" and offload_device(config, "optimizer") == "none"


def configure_nvme(config: Mapping[str, Any], recipe: Recipe, ranks: int) -> dict[str, Any]:
    """Return a config in which offloading to NVMe uses a separate folder per run, and buffers that fit the model.

    DeepSpeed's default buffers take a gigabyte even for a small model, and are too small for a large embedding on few
    ranks. Without separate folders, all runs on a machine would share one folder and leave their files in it.

    Args:
        config: The resolved DeepSpeed config, which is not modified.
        recipe: The recipe, which defines the size of the model and the run directory.
        ranks: Number of ranks over which ZeRO partitions parameters.

    Returns:
        A modified copy of the config. Buffer sizes that the config sets are kept.

    Raises:
        UserError: If the config offloads to NVMe and DeepSpeed's operator for it cannot be built.
    """
    completed = copy.deepcopy(dict(config))
    on_nvme = [f"offload_{what}" for what in ("param", "optimizer") if offload_device(config, what) == "nvme"]
    if on_nvme:
        _check_operator()
    run = hashlib.blake2b(os.path.abspath(recipe.run_dir).encode(), digest_size=4).hexdigest()
    for name in on_nvme:
        section = completed["zero_optimization"][name]
        section["nvme_path"] = os.path.join(section["nvme_path"], f"megagpt-{run}")
    if "offload_param" in on_nvme:
        with torch.device("meta"):
            largest = max(parameter.numel() for parameter in GPT(recipe.model).parameters())
        parameters = completed["zero_optimization"]["offload_param"]
        parameters.setdefault("buffer_size", -(-largest // ranks))
        parameters.setdefault("buffer_count", _PARAMETER_BUFFERS)
    return completed


def clear_swap_folders(config: Mapping[str, Any], rank: int) -> list[Path]:
    """Delete this rank's folders on NVMe, which a killed run may have left behind. Returns their paths."""
    sections = [config.get("zero_optimization", {}).get(f"offload_{what}") or {} for what in ("param", "optimizer")]
    roots = {Path(section["nvme_path"]) for section in sections if section.get("device") == "nvme"}
    folders = [root / "zero_stage_3" / name / f"rank{rank}" for root in roots for name in _SWAP_FOLDERS]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return folders


def remove_swap_folders(folders: Sequence[Path]) -> None:
    """Remove this rank's folders and their empty parents. No other rank may be creating folders at the same time."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in list(folder.parents)[:3]:
            with contextlib.suppress(OSError):  # a parent that still holds another rank's folders is not removed
                parent.rmdir()


def _check_operator() -> None:
    """Raise UserError, with a hint on what is missing, if DeepSpeed's operator for asynchronous I/O cannot be built."""
    try:
        deepspeed_ops.load("async_io")
    except Exception as error:
        raise UserError(
            "offload to NVMe needs DeepSpeed's operator async_io, which cannot be built here",
            str(error).strip().splitlines()[0],
            "install libaio's headers (Debian: libaio-dev) and a C++ compiler, or offload to cpu",
        ) from error
