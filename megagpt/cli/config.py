"""Subcommands for recipes and DeepSpeed configs: `megagpt keys`, `megagpt plan`, and two hidden ones for scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megagpt.cli.options import Json, Overrides, print_result
from megagpt.errors import EXIT_DONE, EXIT_FAILURE

app = typer.Typer()


@app.command()
def keys(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="sections or keys (data, lr, …); default: all")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the keys of a recipe. Shows the type, default, meaning and unit of each key, and the model presets."""
    from megagpt.config.recipe import reference as implementation

    print_result(implementation.keys(tuple(names or ())), as_json)


@app.command(context_settings={"allow_interspersed_args": True})
def plan(
    recipe: Annotated[Path, typer.Option(help="what is trained")],
    deepspeed_config: Annotated[
        Path,
        typer.Option(
            "--deepspeed_config",
            "--deepspeed-config",
            help="how training is distributed; given a folder, list the configs in it that fit, best first",
        ),
    ],
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option(help="total number of ranks", min=1)] = None,
    nodes: Annotated[int | None, typer.Option(help="number of nodes", min=1)] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="ranks per node", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="H100, A100-80, … or a memory size: 24GiB")] = None,
    host_memory: Annotated[str | None, typer.Option(help="host memory per node: 512GiB")] = None,
    as_json: Json = False,
) -> None:
    """Estimate what a run takes, and whether it fits. Shows memory, time, disk and network, and changes that fit."""
    from megagpt import plan as implementation

    options = implementation.PlanOptions(
        recipe, deepspeed_config, tuple(overrides or ()), world_size, nodes, gpus_per_node, device, host_memory
    )
    if deepspeed_config.is_dir():
        choices = implementation.search(options)
        print_result(choices, as_json)
        raise typer.Exit(EXIT_DONE if choices.choices else EXIT_FAILURE)
    result = implementation.plan(options)
    print_result(result, as_json)
    if "does not fit" in (result.fit.device, result.fit.host):
        raise typer.Exit(EXIT_FAILURE)


@app.command("run-directory", hidden=True, context_settings={"ignore_unknown_options": True})
def run_directory(
    recipe: Path,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="arguments of `megagpt train`; all but overrides are ignored")
    ] = None,
) -> None:
    """Print the run directory of a recipe, for job scripts."""
    from megagpt.config.recipe import load

    overrides = [argument for argument in arguments or () if "=" in argument and not argument.startswith("-")]
    print(load(recipe, overrides).run_dir)


@app.command("deepspeed-keys", hidden=True)
def deepspeed_keys() -> None:
    """Print config/deepspeed/known_keys.json for the installed DeepSpeed."""
    from megagpt.engine.deepspeed_keys import snapshot

    print(snapshot())
