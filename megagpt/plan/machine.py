"""Devices by name: their memory, and what share of their peak published runs have reached."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megagpt.errors import UserError, closest_match
from megagpt.model import flops

if TYPE_CHECKING:
    from megagpt.config.deepspeed import Layout

_GIB = 1 << 30
_MEMORY = {"V100-16": 16, "V100-32": 32, "A100-40": 40, "A100-80": 80, "A800": 80, "H100": 80, "H800": 80, "H200": 141}
"""nominal, GiB"""
SAFE = 0.8
"""Estimates up to this share of a GPU's memory never ran out in 454 runs on A100 and H100 (arXiv 2411.06465); beyond
them come the CUDA context, NCCL's buffers and fragmentation."""


@dataclass(frozen=True)
class Device:
    """Something with memory; a known name also has a peak."""

    name: str
    memory: int
    """bytes"""


def device(text: str) -> Device:
    """A known name, or a size: 24GiB, 24GB, 24 (GiB). Raises UserError for anything else."""
    if text in _MEMORY:
        return Device(text, _MEMORY[text] * _GIB)
    size = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(GiB|GB)?", text)
    if size:
        return Device(text, int(float(size[1]) * (10**9 if size[2] == "GB" else _GIB)))
    near = closest_match(text, _MEMORY)
    do = f"write {near}" if near else f"name one of {', '.join(_MEMORY)}, or a size such as 24GiB"
    raise UserError(f"there is no device {text} here", f"--device {text}", do)


@dataclass(frozen=True)
class Utilisation:
    """The share of its peak that a device has reached: lowest and highest, and where."""

    low: float
    high: float
    source: str


_FOUNDRY = "llm-foundry scripts/train/benchmarking (FSDP)"
# model FLOPs by the count of cost.flops_per_token, recomputation not among them, in whole per cent outwards
# by device, whether tensor or pipeline parts, whether most blocks are recomputed
_REACHED = {
    ("H100", False, False): Utilisation(0.33, 0.47, f"{_FOUNDRY}, 7B and 13B; torchtitan, Llama 3.1 8B"),
    ("H100", False, True): Utilisation(0.30, 0.39, f"{_FOUNDRY}, 7B and 30B"),
    ("H100", True, False): Utilisation(0.30, 0.49, "Megatron-LM README, 1.7B to 462B; nanotron, 8B and 70B"),
    ("A100", False, False): Utilisation(0.42, 0.65, f"{_FOUNDRY}, 125M to 7B"),
    ("A100", False, True): Utilisation(0.34, 0.44, f"{_FOUNDRY}, 13B; Megatron-LM at SC21, 175B with ZeRO-3"),
    ("A100", True, False): Utilisation(0.41, 0.56, "arXiv 2205.05198, 22B and 530B, selective recomputation"),
    ("A100", True, True): Utilisation(0.32, 0.44, "arXiv 2205.05198, 22B and 530B, full recomputation"),
    ("V100", False, False): Utilisation(0.33, 0.42, "bigscience tr3m, 1.3B"),
    ("V100", False, True): Utilisation(0.28, 0.35, "bigscience tr3m, 1.3B"),
}
_SAME = {"A800": "A100", "H800": "H100", "H200": "H100"}  # the same arithmetic units


def utilisation(name: str, layout: Layout, blocks: int) -> Utilisation | None:
    """What has been reached with the like of this layout; None for a device of which nothing is known here."""
    kind = name.partition("-")[0]
    cut = layout.tensor_parallel * layout.pipeline_stages > 1
    again = 2 * layout.recomputed_blocks > blocks
    return _REACHED.get((_SAME.get(kind, kind), cut, again))


def peak(name: str, precision: str) -> float | None:
    """Peak FLOP/s; None where it is not known."""
    return flops.peak_flops(name, precision)
