"""Known devices with their memory, and the fractions of their peak FLOP/s that published runs have reached."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megagpt.errors import UserError, closest_match

if TYPE_CHECKING:
    from megagpt.config.deepspeed import Layout

_GIB = 1 << 30
_MEMORY = {"V100-16": 16, "V100-32": 32, "A100-40": 40, "A100-80": 80, "A800": 80, "H100": 80, "H800": 80, "H200": 141}
"""Nominal memory of each device in GiB."""
SAFE_FRACTION = 0.8
"""Fraction of a GPU's memory up to which an estimate is considered safe.

In 454 runs on A100 and H100, no run with an estimate up to this fraction ran out of memory (arXiv 2411.06465). The rest
is needed for the CUDA context, NCCL's buffers and fragmentation.
"""


@dataclass(frozen=True)
class Device:
    """A device and its memory. The peak FLOP/s are known only for devices with a known name."""

    name: str
    memory: int
    """size of the memory in bytes"""


def parse_device(text: str, option: str = "--device") -> Device:
    """Parse the name of a device, or a memory size such as 24GiB, 24GB or 24 (in GiB).

    Args:
        text: the value of the option.
        option: the name of the option, for the error message.

    Returns:
        The device.

    Raises:
        UserError: The text is neither a known device nor a size.
    """
    if text in _MEMORY:
        return Device(text, _MEMORY[text] * _GIB)
    size = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(GiB|GB)?", text)
    if size:
        return Device(text, int(float(size[1]) * (10**9 if size[2] == "GB" else _GIB)))
    near = closest_match(text, _MEMORY)
    do = f"write {near}" if near else f"write one of {', '.join(_MEMORY)}, or a size such as 24GiB"
    raise UserError(f"{text} is neither a known device nor a size", f"{option} {text}", do)


@dataclass(frozen=True)
class Utilization:
    """Lowest and highest fraction of its peak FLOP/s that a device has reached, and the runs that reached them."""

    low: float
    high: float
    source: str


_FOUNDRY = "llm-foundry scripts/train/benchmarking (FSDP)"
# The utilization refers to the model's FLOPs as counted by flops.flops_per_token, without recomputation. The lowest
# value is rounded down and the highest value is rounded up to a whole percent. The keys are: device, whether there is
# tensor or pipeline parallelism, and whether most blocks are recomputed.
_REACHED = {
    ("H100", False, False): Utilization(0.33, 0.47, f"{_FOUNDRY}, 7B and 13B; torchtitan, Llama 3.1 8B"),
    ("H100", False, True): Utilization(0.30, 0.39, f"{_FOUNDRY}, 7B and 30B"),
    ("H100", True, False): Utilization(0.30, 0.49, "Megatron-LM README, 1.7B to 462B; nanotron, 8B and 70B"),
    ("A100", False, False): Utilization(0.42, 0.65, f"{_FOUNDRY}, 125M to 7B"),
    ("A100", False, True): Utilization(0.34, 0.44, f"{_FOUNDRY}, 13B; Megatron-LM at SC21, 175B with ZeRO-3"),
    ("A100", True, False): Utilization(0.41, 0.56, "arXiv 2205.05198, 22B and 530B, selective recomputation"),
    ("A100", True, True): Utilization(0.32, 0.44, "arXiv 2205.05198, 22B and 530B, full recomputation"),
    ("V100", False, False): Utilization(0.33, 0.42, "bigscience tr3m, 1.3B"),
    ("V100", False, True): Utilization(0.28, 0.35, "bigscience tr3m, 1.3B"),
}
# Devices that have the same arithmetic units as another device.
_SAME_COMPUTE = {"A800": "A100", "H800": "H100", "H200": "H100"}


def utilization(name: str, layout: Layout, blocks: int) -> Utilization | None:
    """Return the utilization that published runs with a similar layout have reached.

    Args:
        name: name of the device.
        layout: the layout of the run.
        blocks: number of transformer blocks of the model.

    Returns:
        The utilization, or None if no published run of this kind is known.
    """
    kind = name.partition("-")[0]
    splits_model = layout.tensor_parallel * layout.pipeline_stages > 1
    mostly_recomputed = 2 * layout.recomputed_blocks > blocks
    return _REACHED.get((_SAME_COMPUTE.get(kind, kind), splits_model, mostly_recomputed))
