"""Subcommands that check machines: `megagpt hosts`, `megagpt doctor`, and hidden ones for scripts and the doctor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megagpt.cli.options import Json, Overrides, positive, print_result

app = typer.Typer()


@app.command()
def hosts(
    file: Annotated[Path, typer.Argument(help="a hostfile, as read by `deepspeed --hostfile`")],
    write_environment: Annotated[
        Path | None,
        typer.Option(help="write the environment variables that the other hosts need to this file, for DS_ENV_FILE"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a hostfile. Lists its hosts and ranks, or every mistake with its line."""
    from megagpt.cluster import hosts_command as implementation

    print_result(implementation.hosts(file, write_environment, dict(os.environ)), as_json)


@app.command(context_settings={"allow_interspersed_args": True})
def doctor(
    hostfile: Annotated[
        Path | None, typer.Option(help="check its hosts over ssh, the way `deepspeed` reaches them")
    ] = None,
    as_rank: Annotated[
        bool, typer.Option("--as-rank", help="the doctor itself was started on every rank (srun): no ssh")
    ] = False,
    recipe: Annotated[Path | None, typer.Option(help="also check its data, run directory and free space")] = None,
    deepspeed_config: Annotated[
        Path | None,
        typer.Option("--deepspeed_config", "--deepspeed-config", help="also check what its layout needs"),
    ] = None,
    overrides: Overrides = None,
    limit: Annotated[
        float,
        typer.Option(help="time limit per check in seconds; ten times as long for compilation", callback=positive),
    ] = 60.0,
    as_json: Json = False,
) -> None:
    """Find what would stop training here, or on a cluster. Suggests fixes. The exit code is 1 if there are problems."""
    from megagpt.doctor import command

    options = command.Options(hostfile, as_rank, recipe, deepspeed_config, tuple(overrides or ()), limit)
    result = command.doctor(options, os.environ)
    if result:  # With --as-rank, only rank 0 has the result.
        print_result(result, as_json)
        raise typer.Exit(result.code)


@app.command("free-port", hidden=True)
def free_port() -> None:
    """Print a free TCP port, for scripts that must pass one to a launcher."""
    from megagpt import cluster

    print(cluster.free_port())


@app.command("host-agent", hidden=True)
def host_agent() -> None:
    """Run the doctor's checks on this host, driven over standard input and output."""
    from megagpt.doctor.agent import main

    main()
