"""Subcommands that a launcher starts on every rank: `megagpt train` and `megagpt parity`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megagpt.cli.options import DeepSpeedConfig, LocalRank, Overrides, check_accelerator, not_negative
from megagpt.errors import require_linux

app = typer.Typer()


@app.command(context_settings={"allow_interspersed_args": True})
def train(
    recipe: Annotated[Path, typer.Option(help="what is trained: a YAML file from launch/recipes/ or your own")],
    deepspeed_config: DeepSpeedConfig,
    overrides: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto, must or never")] = "auto",
    expect_world_size: Annotated[
        int | None, typer.Option(help="refuse to start with any other number of ranks", min=1)
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="time limit: save, then exit with code 75", callback=not_negative)
    ] = None,
    allow_change: Annotated[
        list[str] | None, typer.Option(help="recipe key allowed to differ from the checkpoint (repeatable)")
    ] = None,
    local_rank: LocalRank = 0,
) -> None:
    """Train, or resume an interrupted run. Start it with `deepspeed`, torchrun, srun, or directly."""
    require_linux("training")
    check_accelerator(os.environ)
    from megagpt.training import loop as implementation
    from megagpt.training.setup import TrainOptions

    options = TrainOptions(
        recipe,
        deepspeed_config,
        tuple(overrides or ()),
        resume,
        expect_world_size,
        max_minutes,
        tuple(allow_change or ()),
    )
    raise typer.Exit(implementation.train(options))


@app.command(context_settings={"allow_interspersed_args": True})
def parity(
    recipe: Annotated[Path, typer.Option(help="what is trained; reduced to a run of seconds that keeps every switch")],
    deepspeed_config: DeepSpeedConfig,
    overrides: Overrides = None,
    updates: Annotated[int, typer.Option(help="number of updates to compare", min=8)] = 20,
    local_rank: LocalRank = 0,
) -> None:
    """Check that a layout trains the same as one process. Start it the way you will start training."""
    check_accelerator(os.environ)
    from megagpt import parity as implementation

    options = implementation.ParityOptions(recipe, deepspeed_config, tuple(overrides or ()), updates)
    raise typer.Exit(implementation.parity(options))
