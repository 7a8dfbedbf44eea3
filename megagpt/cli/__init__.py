"""The `megagpt` command.

Each group of subcommands has its own file. A subcommand imports its implementation only when it runs, so
`megagpt --help` loads neither torch nor DeepSpeed.

Exit codes are 0 for success, 2 for a mistake by the user (`UserError`), 75 for a run that was stopped after saving, and
1 for any other failure. `megagpt status` also returns 3 for a run that is still training.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

# This must be set before torch is first imported. Waiting threads must not spin, because two ranks on one machine would
# then starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from megagpt import __version__
from megagpt.cli import cluster, config, data, run, train
from megagpt.cli.options import CommandsInOrderOfUse, expand_home, refuse_dashed_overrides
from megagpt.errors import EXIT_DONE, UserError

app = typer.Typer(
    cls=CommandsInOrderOfUse,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data.tokenizer_app, name="tokenizer")
app.add_typer(data.data_app, name="data")
for _module in (data, config, train, run, cluster):
    app.add_typer(_module.app)  # Without a name, its subcommands become subcommands of `megagpt` itself.


def _print_version(requested: bool) -> None:
    if requested:
        print(f"megagpt {__version__}")
        raise typer.Exit


@app.callback()
def megagpt(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Pre-train a GPT with DeepSpeed: from raw text to an evaluated, exported model."""


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code. A `UserError` is printed without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks is shown as "?" instead of raising an error.
            stream.reconfigure(errors="replace")
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        refuse_dashed_overrides(arguments)
        app(expand_home(arguments))
    except UserError as error:
        sys.stderr.write(f"{error}\n")  # A single write, because other ranks write to the same stream.
        return error.exit_code
    except SystemExit as end:  # Typer exits this way, for example with code 2 for an invalid option.
        return end.code if isinstance(end.code, int) else EXIT_DONE
    return EXIT_DONE
