"""Requirements of a job on its hosts, read from recipe and config without DeepSpeed, which may fail to load here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.config.recipe import Recipe


@dataclass(frozen=True)
class JobRequirements:
    """Requirements that every host is checked for. Empty fields are not checked. Sizes are in bytes."""

    recipe: str = ""
    config: str = ""
    files: tuple[str, ...] = ()
    corpora: tuple[str, ...] = ()
    """prefixes of the corpora"""
    run_dir: str = ""
    keep_last: int | None = None
    """number of checkpoints that are kept; None keeps all"""
    checkpoint: int = 0
    """free space that is needed to save one checkpoint"""
    operators: tuple[str, ...] = ()
    """DeepSpeed's compiled operators that must load on every host"""
    gpu_operators: tuple[str, ...] = ()
    """compiled operators that should load on hosts with a GPU"""
    offloads: bool = False
    host: int = 0
    """host memory per rank on a host with GPUs"""
    host_alone: int = 0
    """host memory per rank on a host without GPUs"""
    device: int = 0
    """device memory per rank"""
    nvme: str = ""
    """folder to which state is offloaded"""
    nvme_bytes: int = 0
    """space that each rank needs in the folder `nvme`"""

    @property
    def complete(self) -> bool:
        """True if both a recipe and a config were given."""
        return bool(self.recipe and self.config)


def read_requirements(
    recipe: Path | None, config: Path | None, overrides: Sequence[str], world_size: int
) -> JobRequirements:
    """Return the requirements of a job on its hosts.

    Args:
        recipe: Path of the recipe; None to skip all checks that depend on it.
        config: Path of the DeepSpeed config; None to skip all checks that depend on it.
        overrides: `key=value` arguments for the recipe, and `ds.key=value` arguments for the config.
        world_size: Total number of ranks.

    Returns:
        The requirements.

    Raises:
        UserError: The recipe, the config or an override has a mistake that training would report, too.
    """
    if overrides and recipe is None:
        raise UserError("overrides need a recipe, but none is given", " ".join(overrides), "pass --recipe")
    fields: dict[str, Any] = {"recipe": str(recipe or ""), "config": str(config or "")}
    files = [str(path) for path in (recipe, config) if path]
    muon = False
    if recipe is not None:
        from megagpt.config import recipe as recipes

        loaded = recipes.load(recipe, tuple(overrides))
        muon = loaded.optimizer.type == "muon"
        tokenizer = loaded.data.tokenizer or ""
        if tokenizer.endswith((".model", ".json")):  # Otherwise it is the name of a tiktoken encoding.
            files.append(tokenizer)
        fields |= _from_recipe(loaded)
        if config is not None:
            fields |= _memory(config, loaded, overrides, world_size)
    if config is not None:
        fields |= _from_config(config, overrides, muon)
    return JobRequirements(**fields, files=tuple(files))


def _from_recipe(recipe: Recipe) -> dict[str, Any]:
    from megagpt.model import flops

    sources = (*(source.path for source in recipe.data.train), *recipe.data.validation)
    return {
        "corpora": tuple(dict.fromkeys(sources)), "run_dir": recipe.run_dir, "keep_last": recipe.checkpoint.keep_last,
        "checkpoint": int(flops.CHECKPOINT_HEADROOM * flops.checkpoint_bytes(recipe.model)),
    }  # fmt: skip


def _memory(config: Path, recipe: Recipe, overrides: Sequence[str], world_size: int) -> dict[str, int]:
    """Return the bytes that the fullest rank needs, as `megagpt plan` estimates them."""
    from megagpt.config import deepspeed as ds_config
    from megagpt.config.deepspeed.known_keys import recorded_keys
    from megagpt.plan.memory import memory

    resolved = ds_config.load(config, recipe, world_size, recorded_keys(), tuple(overrides))
    on_gpu, on_cpu = memory(resolved), memory(resolved, on_cpu=True)
    return {"host": on_gpu.host, "host_alone": on_cpu.device + on_cpu.host, "device": on_gpu.device,
            "nvme_bytes": on_gpu.nvme}  # fmt: skip


def _from_config(path: Path, overrides: Sequence[str], muon: bool) -> dict[str, Any]:
    """Return the operators and folders that a config requires. They also depend on the recipe's optimizer."""
    from megagpt.config.syntax.hjson_reader import read_hjson

    tree = read_hjson(path)
    for override in overrides:
        if override.startswith("ds."):
            tree.override(override, prefix="ds.")
    zero = _section(tree.values, "zero_optimization")
    optimizer, params = (_section(zero, f"offload_{what}") for what in ("optimizer", "param"))
    devices = [section.get("device", "none") for section in (optimizer, params)]
    folders = [str(section.get("nvme_path", "")) for section in (optimizer, params) if section.get("device") == "nvme"]
    gpu_operators = []
    if devices[0] == "none" and not muon:
        gpu_operators.append("fused_adam")
    if zero.get("zero_quantized_weights") or zero.get("zero_quantized_gradients"):
        gpu_operators.append("quantizer")
    return {
        "operators": ("async_io",) if folders else (), "gpu_operators": tuple(gpu_operators),
        "offloads": devices != ["none", "none"], "nvme": folders[0] if folders else "",
    }  # fmt: skip


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    return value if isinstance(value, dict) else {}
