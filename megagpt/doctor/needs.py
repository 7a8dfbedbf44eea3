"""What a recipe and a DeepSpeed config need of the hosts, read without DeepSpeed, which may not load here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.recipe import Recipe


@dataclass(frozen=True)
class Needs:
    """What is asked of every host; empty parts were not asked.

    `corpora` are prefixes. `checkpoint` is the bytes of one, with the room that saving insists on, and `keep_last` how
    many are kept (None: all). `operators` must load, `gpu_operators` are tried where there is a GPU. Of each rank are
    the bytes in `host` memory beside a GPU, in that of a host without one (`host_alone`), on the `device`, at `nvme`.
    """

    recipe: str = ""
    config: str = ""
    files: tuple[str, ...] = ()
    corpora: tuple[str, ...] = ()
    run_dir: str = ""
    keep_last: int | None = None
    checkpoint: int = 0
    operators: tuple[str, ...] = ()
    gpu_operators: tuple[str, ...] = ()
    offloads: bool = False
    host: int = 0
    host_alone: int = 0
    device: int = 0
    nvme: str = ""
    nvme_bytes: int = 0

    @property
    def whole(self) -> bool:
        """Whether both a recipe and a config were given."""
        return bool(self.recipe and self.config)


def of(recipe: Path | None, config: Path | None, overrides: Sequence[str], world: int) -> Needs:
    """The needs of a recipe and a config, each of which may be None, on so many ranks.

    Raises UserError for their mistakes, as training would.
    """
    words = tuple(overrides)
    if words and recipe is None:
        raise UserError("these words change a recipe, but none is given", " ".join(words), "give --recipe")
    given: dict[str, Any] = {"recipe": str(recipe or ""), "config": str(config or "")}
    files = [str(path) for path in (recipe, config) if path]
    muon = False
    if recipe is not None:
        from megagpt import recipe as recipes

        read = recipes.load(recipe, words)
        muon = read.optimizer.type == "muon"
        named = read.data.tokenizer or ""  # else the name of an encoding
        files += [named] if named.endswith((".model", ".json")) else []
        given |= _of_recipe(read)
        if config is not None:
            given |= _sizes(config, read, words, world)
    if config is not None:
        given |= _of_config(config, words, muon)
    return Needs(**given, files=tuple(files))


def _of_recipe(recipe: Recipe) -> dict[str, Any]:
    from megagpt.model import cost
    from megagpt.plan.states import MASTER_AND_MOMENTS

    sources = (*(source.path for source in recipe.data.train), *recipe.data.validation)
    return {
        "corpora": tuple(dict.fromkeys(sources)), "run_dir": recipe.run_dir, "keep_last": recipe.checkpoint.keep_last,
        "checkpoint": int(1.2 * MASTER_AND_MOMENTS * cost.parameters(recipe.model)),  # run/checkpoint.py
    }  # fmt: skip


def _sizes(config: Path, recipe: Recipe, words: Sequence[str], world: int) -> dict[str, int]:
    """What the fullest rank takes, as `megagpt plan` has it."""
    from megagpt import ds_config
    from megagpt.ds_config.known import recorded_keys
    from megagpt.plan.memory import memory

    resolved = ds_config.load(config, recipe, world, recorded_keys(), words)
    beside, alone = memory(resolved), memory(resolved, on_cpu=True)
    return {
        "host": beside.host, "host_alone": alone.device + alone.host, "device": beside.device,
        "nvme_bytes": beside.nvme,
    }  # fmt: skip


def _of_config(path: Path, words: Sequence[str], muon: bool) -> dict[str, Any]:
    """Operators and folders, which do not depend on the recipe but for its optimizer."""
    from megagpt.ds_config.reading import read_hjson

    tree = read_hjson(path)
    for word in words:
        if word.startswith("ds."):
            tree.override(word, prefix="ds.")
    zero = _section(tree.values, "zero_optimization")
    parts = [_section(zero, f"offload_{what}") for what in ("optimizer", "param")]
    folders = [str(part.get("nvme_path", "")) for part in parts if part.get("device") == "nvme"]
    on_device = parts[0].get("device", "none") == "none"
    quantized = zero.get("zero_quantized_weights") or zero.get("zero_quantized_gradients")
    return {
        "operators": ("async_io",) if folders else (),
        "gpu_operators": (*(["fused_adam"] if on_device and not muon else []), *(["quantizer"] if quantized else [])),
        "offloads": any(part.get("device", "none") != "none" for part in parts),
        "nvme": folders[0] if folders else "",
    }


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    return value if isinstance(value, dict) else {}
