"""The `megagpt` command. Each group of subcommands has a file; a subcommand imports its implementation when it runs.

So `megagpt --help` loads neither torch nor DeepSpeed.

Exit codes: 0 success, 2 a mistake of the user's (`UserError`), 75 stopped after saving, 1 any other failure. `status`
also returns 3 for a run that is still training.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

# Set before torch is first imported: waiting threads must not spin, or two ranks on one machine starve each other.
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
    app.add_typer(_module.app)  # without a name: its subcommands become subcommands of `megagpt` itself


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
            stream.reconfigure(errors="replace")  # a terminal without some character shows "?" instead of failing
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        refuse_dashed_overrides(arguments)
        app(expand_home(arguments))
    except UserError as error:
        sys.stderr.write(f"{error}\n")  # one write, because other ranks write to the same stream
        return error.exit_code
    except SystemExit as end:  # typer exits this way, with code 2 for an invalid option
        return end.code if isinstance(end.code, int) else EXIT_DONE
    return EXIT_DONE
