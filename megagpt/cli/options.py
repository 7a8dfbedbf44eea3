"""Arguments and options that several subcommands share, and functions to order subcommands and print results."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from megagpt.errors import UserError, without_controls

_ORDER = (
    "tokenizer", "prepare", "data", "keys", "plan", "hosts", "doctor", "parity",
    "train", "stop", "status", "checkpoints", "report", "evaluate", "generate", "export",
)  # fmt: skip

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="files, folders or glob patterns (txt, md, jsonl, parquet; also gz, zst, xz, bz2), `-` for standard "
        "input, @MANIFEST, URLs, or `default` for the default corpus",
    ),
]
DeepSpeedConfig = Annotated[
    Path,
    typer.Option("--deepspeed_config", "--deepspeed-config", help="how training is distributed: a DeepSpeed JSON file"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE...", help="model.n_layer=4 overrides the recipe, ds.KEY=VALUE the DeepSpeed config"
    ),
]
Prefix = Annotated[str, typer.Argument(metavar="PREFIX", help="a corpus: its path without .bin or .idx")]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")]
TextKey = Annotated[str, typer.Option(help="key of the text in a JSON Lines record; `a.b` is b inside a")]
Workers = Annotated[int | None, typer.Option(help="worker processes; default: one per core", min=1)]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
# DeepSpeed's launcher passes this option. It is accepted and ignored.
LocalRank = Annotated[int, typer.Option("--local_rank", hidden=True)]


class CommandsInOrderOfUse(typer.core.TyperGroup):
    """Command group whose help lists the subcommands in the order in which they are used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the subcommands in the order of use, hidden ones last."""
        return sorted(self.commands, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


def finite(value: float | None) -> float | None:
    """Check an option: nan passes every comparison with a minimum and maximum. Raises typer.BadParameter."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def not_negative(value: float | None) -> float | None:
    """Check an option that must be finite and at least 0. Raises typer.BadParameter."""
    if value is not None and value < 0:
        raise typer.BadParameter(f"{value:g} is below 0.")
    return finite(value)


def positive(value: float | None) -> float | None:
    """Check an option that must be above 0 and finite. Raises typer.BadParameter."""
    if value is not None and value <= 0:
        raise typer.BadParameter(f"{value:g} is not above 0.")
    return finite(value)


_ACCELERATORS = ("cuda", "cpu", "xpu", "npu", "mps", "hpu", "mlu", "sdaa", "supa")  # deepspeed/accelerator
_OVERRIDE = re.compile(r"--((?:ds\.)?[a-z]\w*(?:\.\w+)+|run_dir|init_from|precision)(?:=.*)?", re.DOTALL)


def check_accelerator(env: Mapping[str, str]) -> None:
    """Raise UserError if DS_ACCELERATOR is a name that DeepSpeed does not know: its import would fail."""
    name = env.get("DS_ACCELERATOR")
    if name is not None and name.removesuffix(".external") not in _ACCELERATORS:
        do = "unset it to use what the machine has, or set it to cuda or cpu"
        raise UserError("DeepSpeed has no such accelerator", f"DS_ACCELERATOR={name}", do)


def refuse_dashed_overrides(arguments: Sequence[str]) -> None:
    """Raise UserError for an override of the recipe or the DeepSpeed config that is written as an option."""
    for argument in arguments:
        if match := _OVERRIDE.fullmatch(argument):
            do = f"write {argument[2:] if '=' in argument else f'{match[1]}=VALUE'}, without dashes"
            raise UserError(f"{match[1]} is not an option", f"command line  {argument}", do)


_TEXT_OPTIONS = ("--prompt", "--text-key", "--text_key")


def expand_home(arguments: Sequence[str]) -> list[str]:
    """Expand `~` in arguments such as `--output=~/x`, in which bash does not expand it.

    Without this function, the command would create a folder that is literally named `~`.
    """
    expanded = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        is_path = option.startswith("--") and option not in _TEXT_OPTIONS and value.startswith("~")
        expanded.append(f"{option}{equals}{os.path.expanduser(value)}" if is_path else argument)
    return expanded


def print_result(result: Any, as_json: bool) -> None:
    """Print the result of a subcommand.

    Args:
        result: a dataclass. `str(result)` is the text for a terminal.
        as_json: whether to print the fields of the result as one JSON object instead.
    """
    print(json.dumps(asdict(result)) if as_json else without_controls(str(result), colours=True))
