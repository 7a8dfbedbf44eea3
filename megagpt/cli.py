"""The `megagpt` command: the table of verbs. Each verb's module is imported when it is called, not before.

Every command returns its exit code: 0 done, 2 a user's mistake, 75 stopped and saved, 1 anything else; `status` also 3.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

# before torch is imported anywhere: threads that wait must not spin, or two ranks on one machine starve each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from megagpt import __version__
from megagpt.commands import Config, InOrder, Inputs, Json, Overrides, Run, TextKey, Workers, answer
from megagpt.data.documents import DEFAULT_FRACTION
from megagpt.data_commands import data_app, tokenizer_app
from megagpt.errors import EXIT_DONE, EXIT_FAILURE, UserError, need_linux

app = typer.Typer(
    cls=InOrder, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")


def _say_version(asked: bool) -> None:
    if asked:
        print(f"megagpt {__version__}")
        raise typer.Exit


@app.callback()
def megagpt(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Raw text to a pre-trained, evaluated, exported GPT, on DeepSpeed."""


@app.command()
def keys(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="data, lr, …; all unless given")] = None,
    as_json: Json = False,
) -> None:
    """List the keys of a recipe. Type, default, meaning and unit of each; and the presets."""
    from megagpt import keys as verb

    answer(verb.keys(tuple(names or ())), as_json)


@app.command()
def prepare(
    inputs: Inputs,
    tokenizer: Annotated[
        Path, typer.Option(help="a sentencepiece .model, a tokenizer.json, or the name of a tiktoken encoding")
    ],
    output: Annotated[Path, typer.Option(help="PREFIX of PREFIX.train.* and PREFIX.validation.*")],
    validation_fraction: Annotated[float, typer.Option(help="share of the documents held out")] = DEFAULT_FRACTION,
    workers: Workers = None,
    text_key: TextKey = "text",
    strict: Annotated[bool, typer.Option("--strict", help="the first odd document is an error")] = False,
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="leave out exact copies of documents")] = False,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="mix the documents, the same way each time")] = False,
    engine: Annotated[
        str, typer.Option(help="sentencepiece; or gigatoken, which gives the same ids in a fraction of the time")
    ] = "sentencepiece",
    pack: Annotated[int | None, typer.Option(help="SEQ_LEN of samples to fit documents into whole", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Turn text into a memory-mapped corpus. Three files: .bin, .idx, .json. Typed again after a stop, it goes on."""
    from megagpt import prepare as verb

    options = verb.Options(validation_fraction, workers, text_key, strict, deduplicate, shuffle, engine, pack)
    made = verb.prepare_corpora(inputs, tokenizer, output, options, sys.stderr)
    if made:  # else another rank has the answer
        answer(made.corpora[0] if len(made.corpora) == 1 else made, as_json)


@app.command(context_settings={"allow_interspersed_args": True})
def plan(
    recipe: Annotated[Path, typer.Option(help="what is trained")],
    deepspeed_config: Annotated[
        Path,
        typer.Option(
            "--deepspeed_config", "--deepspeed-config", help="how it is spread; of a folder, those that fit are listed"
        ),
    ],
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option(help="ranks in all", min=1)] = None,
    nodes: Annotated[int | None, typer.Option(help="machines", min=1)] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="ranks on each", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="H100, A100-80, … or its memory: 24GiB")] = None,
    host_memory: Annotated[str | None, typer.Option(help="of each node: 512GiB")] = None,
    as_json: Json = False,
) -> None:
    """Say beforehand what a run takes, and whether it fits. Memory, time, disk, network; else what would fit."""
    from megagpt import plan as verb

    words = tuple(overrides or ())
    options = verb.PlanOptions(recipe, deepspeed_config, words, world_size, nodes, gpus_per_node, device, host_memory)
    if deepspeed_config.is_dir():
        choices = verb.search(options)
        answer(choices, as_json)
        raise typer.Exit(EXIT_DONE if choices.choices else EXIT_FAILURE)
    found = verb.plan(options)
    answer(found, as_json)
    if "does not fit" in (found.fit.device, found.fit.host):
        raise typer.Exit(EXIT_FAILURE)


@app.command(context_settings={"allow_interspersed_args": True})
def train(
    recipe: Annotated[Path, typer.Option(help="what is trained: a YAML file of launch/recipes/ or your own")],
    deepspeed_config: Config,
    overrides: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto, must or never")] = "auto",
    expect_world_size: Annotated[int | None, typer.Option(help="refuse to start on other than N ranks")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="save and exit 75 after so long")] = None,
    allow_change: Annotated[
        list[str] | None, typer.Option(help="a key of the recipe that may differ from the checkpoint's; repeat it")
    ] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    """Train, or go on where training stopped. Start it with `deepspeed`, torchrun, srun or alone."""
    need_linux("training")
    from megagpt import train as verb
    from megagpt.assembly import Options

    words, allowed = tuple(overrides or ()), tuple(allow_change or ())
    options = Options(recipe, deepspeed_config, words, resume, expect_world_size, max_minutes, allowed)
    raise typer.Exit(verb.train(options))


@app.command()
def evaluate(
    run: Run,
    data: Annotated[
        str | None, typer.Option(help="a corpus prefix or a text file; the recipe's validation unless given")
    ] = None,
    yardsticks: Annotated[bool, typer.Option(help="also a unigram model and xz, on the same text")] = False,
    as_json: Json = False,
) -> None:
    """Measure how well a run predicts a text. Loss, perplexity, bits per byte of its newest checkpoint."""
    from megagpt import evaluate as verb

    answer(verb.evaluate(run, data, yardsticks=yardsticks), as_json)


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="text to continue")] = "",
    tokens: Annotated[int, typer.Option(help="how many tokens to add", min=0)] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token", min=0)] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="draw among the K likeliest", min=1)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="draw among the likeliest that hold this share", min=0, max=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="of the draws")] = 1234,
    as_json: Json = False,
) -> None:
    """Continue a text with a run's newest checkpoint."""
    from megagpt import generate as verb

    answer(verb.generate(run, prompt, tokens, temperature, top_k, top_p, seed), as_json)


@app.command()
def export(
    run: Run,
    output: Annotated[Path, typer.Option(help="a folder that is not there yet, or is empty")],
    to: Annotated[str, typer.Option(help="hf: what transformers' from_pretrained reads")] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="of the weights: float32, bfloat16, float16; as trained unless given")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a run's model and tokenizer for other libraries. The model is that of the newest checkpoint."""
    from megagpt import export as verb

    answer(verb.export(run, output, to, dtype), as_json)


@app.command(context_settings={"allow_interspersed_args": True})
def parity(
    recipe: Annotated[Path, typer.Option(help="what is trained; it is shrunk to seconds, all switches kept")],
    deepspeed_config: Config,
    overrides: Overrides = None,
    updates: Annotated[int, typer.Option(help="how many are compared", min=8)] = 20,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    """Check that this layout trains the same as one process. Start it where and as you will start training."""
    from megagpt import parity as verb

    raise typer.Exit(verb.parity(verb.Options(recipe, deepspeed_config, tuple(overrides or ()), updates)))


@app.command()
def checkpoints(
    run: Run,
    verify: Annotated[bool, typer.Option(help="read every byte")] = False,
    as_json: Json = False,
) -> None:
    """List a run's checkpoints. Update, tokens, size, layout, and what is wrong with a damaged one."""
    from megagpt import checkpoints as verb

    answer(verb.checkpoints(run, verify), as_json)


@app.command()
def stop(run: Run) -> None:
    """Ask a run that is training to save, and to exit 75. Where none is, this says and exits as `status` does."""
    from megagpt import checkpoints as verb

    found = verb.stop(run)
    if found.state != "running":
        print(f"{run} is not running. {found}")
        raise typer.Exit(found.code)
    print(f"asked {run} to save and stop; it exits with 75 and goes on when it is started again")


@app.command()
def hosts(
    file: Annotated[Path, typer.Argument(help="a hostfile, as `deepspeed --hostfile` reads it")],
    write_environment: Annotated[
        Path | None, typer.Option(help="write the variables that the other hosts need, for DS_ENV_FILE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a hostfile. Every mistake with its line, else its hosts and ranks."""
    from megagpt import hosts as verb

    answer(verb.hosts(file, write_environment, dict(os.environ)), as_json)


@app.command(context_settings={"allow_interspersed_args": True})
def doctor(
    hostfile: Annotated[Path | None, typer.Option(help="its hosts, over ssh, as `deepspeed` reaches them")] = None,
    as_rank: Annotated[bool, typer.Option("--as-rank", help="started as ranks, by srun: no ssh")] = False,
    recipe: Annotated[Path | None, typer.Option(help="also its data, run directory and room")] = None,
    deepspeed_config: Annotated[
        Path | None, typer.Option("--deepspeed_config", "--deepspeed-config", help="also what its layout needs")
    ] = None,
    overrides: Overrides = None,
    limit: Annotated[float, typer.Option(help="seconds that a step may take; ten times that to compile")] = 60.0,
    as_json: Json = False,
) -> None:
    """Find what would stop training here, or on a cluster. Each thing with its remedy; exit 1 if there is any."""
    from megagpt import doctor as verb

    options = verb.Options(hostfile, as_rank, recipe, deepspeed_config, tuple(overrides or ()), limit)
    if found := verb.doctor(options, os.environ):  # else rank 0 has the answer
        answer(found, as_json)
        raise typer.Exit(found.code)


@app.command()
def status(run: Run, as_json: Json = False) -> None:
    """Say whether a run is done, running, to go on, or failed. Exit code 0, 3, 75, or 1 and 2: for job scripts."""
    from megagpt.run import status as standing

    found = standing.read(run)
    answer(found, as_json)
    raise typer.Exit(found.code)


@app.command()
def report(run: Run) -> None:
    """Draw a run's loss curve, and say where its time went. Here and as loss.svg in the run directory."""
    from megagpt import report as verb
    from megagpt.run import metrics

    print(verb.terminal(run, colour=sys.stdout.isatty()))
    print(f"picture: {verb.picture(run)}")
    print(f"time: {metrics.spent(run)}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code. A user's mistake is printed without a traceback."""
    try:
        app(arguments)
    except UserError as error:
        sys.stderr.write(f"{error}\n")  # in one piece: other ranks write there too
        return error.exit_code
    except SystemExit as end:  # typer ends so, with 2 for a wrong option
        return end.code if isinstance(end.code, int) else EXIT_DONE
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
