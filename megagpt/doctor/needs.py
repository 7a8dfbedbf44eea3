"""What a recipe and a DeepSpeed config need of the hosts, read without DeepSpeed, which may not load here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.errors import UserError
from megagpt.plan.states import MASTER_AND_MOMENTS, offloaded

_WITH_GRADIENT = 4  # bytes of a gradient in fp32
STATE_BYTES = MASTER_AND_MOMENTS + _WITH_GRADIENT  # of a parameter, where nothing is offloaded


@dataclass(frozen=True)
class Needs:
    """What is asked of every host; empty parts were not asked.

    `corpora` are prefixes. `parameters` is their number in the model, 0 without a recipe; `keep_last` is of the
    checkpoints (None: all). `host_bytes` of each parameter lie in host memory, and `nvme_bytes` on NVMe, shared by all
    ranks. `operators` must load, `gpu_operators` are of use on a GPU.
    """

    recipe: str = ""
    config: str = ""
    overrides: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    corpora: tuple[str, ...] = ()
    run_dir: str = ""
    keep_last: int | None = None
    parameters: int = 0
    operators: tuple[str, ...] = ()
    gpu_operators: tuple[str, ...] = ()
    host_bytes: int = 0
    nvme: str = ""
    nvme_bytes: int = 0

    @property
    def whole(self) -> bool:
        """Whether both a recipe and a config were given."""
        return bool(self.recipe and self.config)

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint, with the room that saving insists on (run/checkpoint.py)."""
        return int(1.2 * MASTER_AND_MOMENTS * self.parameters)


def of(recipe: Path | None, config: Path | None, overrides: Sequence[str]) -> Needs:
    """The needs of a recipe and a config, each of which may be None. Raises UserError for their mistakes.

    Whether the two fit together is found out where DeepSpeed loads.
    """
    words = tuple(overrides)
    if words and recipe is None:
        raise UserError("these words change a recipe, but none is given", " ".join(words), "give --recipe")
    given: dict[str, Any] = {"recipe": str(recipe or ""), "config": str(config or ""), "overrides": words}
    files = [str(path) for path in (recipe, config) if path]
    muon = False
    if recipe is not None:
        from megagpt import recipe as recipes
        from megagpt.model import cost

        read = recipes.load(recipe, words)
        sources = (*(source.path for source in read.data.train), *read.data.validation)
        muon = read.optimizer.type == "muon"
        named = read.data.tokenizer or ""  # else the name of an encoding
        files += [named] if named.endswith((".model", ".json")) else []
        given |= {"corpora": tuple(dict.fromkeys(sources)), "run_dir": read.run_dir,
                  "parameters": cost.parameters(read.model), "keep_last": read.checkpoint.keep_last}  # fmt: skip
    if config is not None:
        given |= _of_config(config, words, muon)
    return Needs(**given, files=tuple(files))


def _of_config(path: Path, words: Sequence[str], muon: bool) -> dict[str, Any]:
    from megagpt.ds_config.reading import read_json

    tree = read_json(path)
    for word in words:
        if word.startswith("ds."):
            tree.override(word, prefix="ds.")
    section = tree.values.get("zero_optimization")
    zero = section if isinstance(section, dict) else {}
    parts = {what: _dict(zero.get(f"offload_{what}")) for what in ("param", "optimizer")}
    places = {what: part.get("device", "none") for what, part in parts.items()}
    folders = [str(part.get("nvme_path", "")) for part in parts.values() if part.get("device") == "nvme"]
    # in bf16, which an offloaded model mostly is
    stage = zero.get("stage")
    host, nvme = offloaded(stage if isinstance(stage, int) else 0, 2, 4, places["optimizer"], places["param"])
    return {
        "operators": ("async_io",) if folders else (),
        "gpu_operators": () if muon or places["optimizer"] != "none" else ("fused_adam",),
        "host_bytes": host,
        "nvme": folders[0] if folders else "",
        "nvme_bytes": nvme,
    }


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
