"""What commands share: arguments and options, each with its help, and how they answer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from megagpt.errors import without_controls

_ORDER = (
    "tokenizer", "prepare", "data", "keys", "plan", "hosts", "doctor", "parity",
    "train", "stop", "status", "checkpoints", "report", "evaluate", "generate", "export",
)  # fmt: skip
Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="files, folders, patterns (txt, md, jsonl, parquet; also gz, zst, xz, bz2), `-`, @MANIFEST, addresses; "
        "`default`: the default corpus",
    ),
]
Config = Annotated[
    Path, typer.Option("--deepspeed_config", "--deepspeed-config", help="how it is spread: a DeepSpeed JSON")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="model.n_layer=4 changes the recipe, ds.KEY=VALUE the JSON"),
]
Prefix = Annotated[str, typer.Argument(metavar="PREFIX", help="a corpus: its path without .bin or .idx")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")]
TextKey = Annotated[str, typer.Option(help="where the text stands in a JSON line; `a.b` is b within a")]
Workers = Annotated[int | None, typer.Option(help="processes; as many as there are cores", min=1)]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]


class InOrder(typer.core.TyperGroup):
    """Lists the commands in the order in which they are used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names."""
        return sorted(self.commands, key=_ORDER.index)


def answer(summary: Any, as_json: bool) -> None:
    """Print a verb's figures, for people or as JSON."""
    print(json.dumps(asdict(summary)) if as_json else without_controls(str(summary), colours=True))
