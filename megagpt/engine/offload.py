"""What lies outside the device: parameters and optimizer on the host or on NVMe."""

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

_KINDS = ("optimizer", "float32params", "bfloat16params", "float16params")  # DeepSpeed's names
_BUFFERS = 16  # of parameters read ahead: a layer's own, and those of the next block


def offloaded(config: Mapping[str, Any], what: str) -> str:
    """Where the "param" or "optimizer" lies: cpu, nvme, or none if it stays on the device."""
    section = config.get("zero_optimization", {}).get(f"offload_{what}") or {}
    return str(section.get("device") or "none")


def steps_on_gpu(config: Mapping[str, Any]) -> bool:
    """Whether the optimizer steps on a GPU, or whatever accelerator there is, and not on the host."""
    return deepspeed_ops.device() != "cpu" and offloaded(config, "optimizer") == "none"


def ready(config: Mapping[str, Any], recipe: Recipe, ranks: int) -> dict[str, Any]:
    """The config with what NVMe needs: a folder of the run's own, and buffers that fit the model if it names none.

    DeepSpeed's default buffers are a gigabyte for any model, and too small for a large embedding on few ranks; its
    folder is one for all runs on a machine, and each run's files stay. Raises UserError where NVMe cannot be used.
    """
    filled = copy.deepcopy(dict(config))
    on_nvme = [f"offload_{what}" for what in ("param", "optimizer") if offloaded(config, what) == "nvme"]
    if on_nvme:
        _check_operator()
    run = hashlib.blake2b(os.path.abspath(recipe.run_dir).encode(), digest_size=4).hexdigest()
    for name in on_nvme:
        section = filled["zero_optimization"][name]
        section["nvme_path"] = os.path.join(section["nvme_path"], f"megagpt-{run}")
    if "offload_param" in on_nvme:
        with torch.device("meta"):
            largest = max(parameter.numel() for parameter in GPT(recipe.model).parameters())
        parameters = filled["zero_optimization"]["offload_param"]
        parameters.setdefault("buffer_size", -(-largest // ranks))
        parameters.setdefault("buffer_count", _BUFFERS)
    return filled


def swap_folders(config: Mapping[str, Any], rank: int) -> list[Path]:
    """The folders on NVMe that hold this rank's files; emptied, if a run before this one was killed."""
    sections = [config.get("zero_optimization", {}).get(f"offload_{what}") or {} for what in ("param", "optimizer")]
    roots = {Path(section["nvme_path"]) for section in sections if section.get("device") == "nvme"}
    folders = [root / "zero_stage_3" / kind / f"rank{rank}" for root in roots for kind in _KINDS]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return folders


def clear(folders: Sequence[Path]) -> None:
    """Remove this rank's folders, and those above them that are then empty. Only when no rank makes new ones."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        for above in list(folder.parents)[:3]:
            with contextlib.suppress(OSError):  # not empty: another rank's
                above.rmdir()


def _check_operator() -> None:
    """Build or load DeepSpeed's asynchronous I/O now, and say what is missing if that fails."""
    try:
        deepspeed_ops.load("async_io")
    except Exception as error:
        raise UserError(
            "offload to NVMe needs DeepSpeed's operator async_io, which cannot be built here",
            str(error).strip().splitlines()[0],
            "install libaio's headers (Debian: libaio-dev) and a C++ compiler, or offload to cpu",
        ) from error
