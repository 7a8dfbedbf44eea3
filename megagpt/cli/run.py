"""Subcommands for a run directory: evaluate, generate, export, checkpoints, stop, status, report and a hidden one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megagpt.cli.options import Json, RunDirectory, finite, print_result

app = typer.Typer()


@app.command()
def evaluate(
    run: RunDirectory,
    data: Annotated[
        str | None, typer.Option(help="a corpus prefix or a text file; default: the recipe's validation data")
    ] = None,
    yardsticks: Annotated[
        bool, typer.Option(help="also report a unigram model and xz on the same text, as baselines")
    ] = False,
    as_json: Json = False,
) -> None:
    """Evaluate a run on a text. Reports loss, perplexity and bits per byte of its newest checkpoint."""
    from megagpt.inference import evaluate as implementation

    print_result(implementation.evaluate(run, data, yardsticks=yardsticks), as_json)


@app.command()
def generate(
    run: RunDirectory,
    prompt: Annotated[str, typer.Option(help="text to continue")] = "",
    tokens: Annotated[int, typer.Option(help="number of tokens to generate", min=0)] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the most likely token", min=0, callback=finite)
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="sample from the K most likely tokens", min=1)] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="sample from the most likely tokens with this total probability", min=0, max=1, callback=finite
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="random seed for sampling")] = 1234,
    as_json: Json = False,
) -> None:
    """Continue a prompt with the newest checkpoint of a run."""
    from megagpt.inference import generate as implementation

    print_result(implementation.generate(run, prompt, tokens, temperature, top_k, top_p, seed), as_json)


@app.command()
def export(
    run: RunDirectory,
    output: Annotated[Path, typer.Option(help="a folder that does not exist yet, or is empty")],
    to: Annotated[str, typer.Option(help="hf: the format of Hugging Face transformers")] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(help="dtype of the weights: float32, bfloat16 or float16; default: as trained"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a run's model and tokenizer for other libraries. The model is that of the newest checkpoint."""
    from megagpt.inference import export as implementation

    print_result(implementation.export(run, output, to, dtype), as_json)


@app.command()
def checkpoints(
    run: RunDirectory,
    verify: Annotated[bool, typer.Option(help="read every byte and compare checksums")] = False,
    as_json: Json = False,
) -> None:
    """List a run's checkpoints. Shows update, tokens, size and layout of each, and the problems of damaged ones."""
    from megagpt.checkpoint import listing as implementation

    print_result(implementation.checkpoints(run, verify), as_json)


@app.command()
def stop(run: RunDirectory) -> None:
    """Make a run save its state and exit with code 75. If it is not running, the exit code is that of `status`."""
    from megagpt.training import stop_signals as implementation

    status = implementation.stop(run)
    if status.state != "running":
        print(f"{run} is not running. {status}")
        raise typer.Exit(status.code)
    print(f"Stop requested: {run} will save a checkpoint and exit with 75. Run the same command to resume.")


@app.command()
def status(run: RunDirectory, as_json: Json = False) -> None:
    """Show whether a run is done, running, resumable or failed. The exit code is 0, 3 or 75, or 1 or 2 if it failed."""
    from megagpt.training import status as implementation

    result = implementation.read(run)
    print_result(result, as_json)
    raise typer.Exit(result.code)


@app.command()
def report(run: RunDirectory) -> None:
    """Plot a run's loss curve, and show where its time went. Writes RUN/loss.svg."""
    from megagpt import report as implementation
    from megagpt.training import metrics

    print(implementation.draw_as_text(run, color=sys.stdout.isatty()))
    print(f"time: {metrics.time_breakdown(run)}")
    print(f"picture: {implementation.draw_as_svg(run)}")  # last: a run directory may be read-only


@app.command("mark-starting", hidden=True)
def mark_starting(run: RunDirectory, pid: int) -> None:
    """Record that process PID is about to start the ranks of a run, for job scripts."""
    from megagpt.training import status as implementation

    implementation.mark_starting(run, pid)
