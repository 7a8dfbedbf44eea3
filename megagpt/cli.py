"""The `megagpt` command: the table of verbs. Each verb's module is imported when it is called, not before.

Every command returns its exit code: 0 done, 2 a user's mistake, 75 stopped and saved, 1 anything else; `status` also 3.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

# before torch is imported anywhere: threads that wait must not spin, or two ranks on one machine starve each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from megagpt.data.documents import DEFAULT_FRACTION
from megagpt.errors import EXIT_DONE, EXIT_FAILURE, UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train a tokenizer, or look at one.", rich_markup_mode=None)
app.add_typer(tokenizer_app, name="tokenizer")
data_app = typer.Typer(no_args_is_help=True, help="Look into, verify and merge corpora.", rich_markup_mode=None)
app.add_typer(data_app, name="data")

Inputs = Annotated[
    list[str],
    typer.Argument(
        help="files, folders, patterns (txt, md, jsonl, parquet; also gz, zst, xz, bz2), `-`, @MANIFEST, addresses; "
        "`default`: the default corpus"
    ),
]
Config = Annotated[
    Path, typer.Option("--deepspeed_config", "--deepspeed-config", help="how it is spread: a DeepSpeed JSON")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="model.n_layer=4 changes the recipe, ds.KEY=VALUE the JSON")
]
Prefix = Annotated[str, typer.Argument(help="a corpus: its path without .bin or .idx")]
Run = Annotated[Path, typer.Argument(help="a run directory")]
TextKey = Annotated[str, typer.Option(help="where the text stands in a JSON line; `a.b` is b within a")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]


@tokenizer_app.command("train")
def train_tokenizer(
    inputs: Inputs,
    output: Annotated[Path, typer.Option(help="PREFIX: writes PREFIX.model")],
    vocab_size: Annotated[int, typer.Option(help="pieces, all special ones included")] = 32_000,
    text_key: TextKey = "text",
    as_json: Json = False,
) -> None:
    """Train a lossless sentencepiece tokenizer on text."""
    from megagpt import prepare

    _answer(prepare.train_tokenizer_command(inputs, vocab_size, output, text_key=text_key), as_json)


@tokenizer_app.command("inspect")
def inspect_tokenizer(
    tokenizer: Annotated[Path, typer.Argument(help="as `prepare` takes it")],
    text: Annotated[str, typer.Argument(help="what is cut into tokens; `-`: standard input")],
    as_json: Json = False,
) -> None:
    """Show a text cut into tokens."""
    from megagpt import prepare

    tokens = prepare.inspect_tokenizer(tokenizer, sys.stdin.read() if text == "-" else text)
    if sys.stdout.isatty() and not as_json:
        from rich.console import Console

        Console().print(tokens.coloured())
    else:
        _answer(tokens, as_json)


@app.command()
def prepare(
    inputs: Inputs,
    tokenizer: Annotated[
        Path, typer.Option(help="a sentencepiece .model, a tokenizer.json, or the name of a tiktoken encoding")
    ],
    output: Annotated[Path, typer.Option(help="PREFIX of PREFIX.train.* and PREFIX.validation.*")],
    validation_fraction: Annotated[float, typer.Option(help="share of the documents held out")] = DEFAULT_FRACTION,
    workers: Annotated[int | None, typer.Option(help="processes; as many as there are cores", min=1)] = None,
    text_key: TextKey = "text",
    strict: Annotated[bool, typer.Option("--strict", help="the first odd document is an error")] = False,
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="leave out exact copies of documents")] = False,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="mix the documents, the same way each time")] = False,
    as_json: Json = False,
) -> None:
    """Turn text into a memory-mapped corpus: .bin, .idx and a sidecar .json. Typed again after a stop, it goes on."""
    from megagpt import prepare as verb

    options = verb.Options(validation_fraction, workers, text_key, strict, deduplicate, shuffle)
    made = verb.prepare_corpora(inputs, tokenizer, output, options, sys.stderr)
    if made:  # else another rank has the answer
        _answer(made.corpora[0] if len(made.corpora) == 1 else made, as_json)


@data_app.command("inspect")
def inspect_data(
    prefix: Prefix,
    document: Annotated[list[int] | None, typer.Option(help="show this document; repeat it")] = None,
    sample: Annotated[int, typer.Option(help="show so many documents, evenly spread", min=0)] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="to show documents as text, not as ids")] = None,
    as_json: Json = False,
) -> None:
    """Figures of a corpus, how it was made, and some of its documents."""
    from megagpt import corpora

    _answer(corpora.inspect(prefix, document or (), sample, tokenizer), as_json)


@data_app.command("verify")
def verify_data(
    prefix: Prefix,
    workers: Annotated[int | None, typer.Option(help="threads; as many as there are cores", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Read and check all of a corpus: index, ids, checksums. Exit code 1 if something is wrong."""
    from megagpt import corpora

    verification = corpora.verify(prefix, workers)
    _answer(verification, as_json)
    if verification.wrong:
        raise typer.Exit(EXIT_FAILURE)


@data_app.command("merge")
def merge_data(
    prefixes: Annotated[list[str], typer.Argument(help="corpora, in this order")],
    output: Annotated[str, typer.Option(help="PREFIX of the corpus that is written")],
    as_json: Json = False,
) -> None:
    """Several corpora of one tokenizer to one."""
    from megagpt import corpora

    _answer(corpora.merge(prefixes, output), as_json)


@app.command(context_settings={"allow_interspersed_args": True})
def plan(
    recipe: Annotated[Path, typer.Option(help="what is trained")],
    deepspeed_config: Config,
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option(help="ranks in all", min=1)] = None,
    nodes: Annotated[int | None, typer.Option(help="machines", min=1)] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="ranks on each", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="H100, A100-80, … or its memory: 24GiB")] = None,
    host_memory: Annotated[str | None, typer.Option(help="of each node: 512GiB")] = None,
    as_json: Json = False,
) -> None:
    """Say beforehand what a run takes and whether it fits: memory by part, time, disk, network; else what would fit."""
    from megagpt import plan as verb

    words = tuple(overrides or ())
    options = verb.Options(recipe, deepspeed_config, words, world_size, nodes, gpus_per_node, device, host_memory)
    found = verb.plan(options)
    _answer(found, as_json)
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
    from megagpt import train as verb
    from megagpt.assembly import Options

    words, allowed = tuple(overrides or ()), tuple(allow_change or ())
    options = Options(recipe, deepspeed_config, words, resume, expect_world_size, max_minutes, allowed)
    raise typer.Exit(verb.train(options))


@app.command()
def evaluate(
    run: Run,
    data: Annotated[str | None, typer.Option(help="a corpus prefix or a text file; the recipe's validation")] = None,
    yardsticks: Annotated[bool, typer.Option(help="also a unigram model and xz, on the same text")] = False,
    as_json: Json = False,
) -> None:
    """Loss, perplexity and bits per byte of a run's newest checkpoint over a whole corpus."""
    from megagpt import evaluate as verb

    _answer(verb.evaluate(run, data, yardsticks=yardsticks), as_json)


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="text to continue")] = "",
    tokens: Annotated[int, typer.Option(help="how many tokens to add")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="draw among the K likeliest")] = None,
    top_p: Annotated[float | None, typer.Option(help="draw among the likeliest that hold this share")] = None,
    seed: Annotated[int, typer.Option(help="of the draws")] = 1234,
    as_json: Json = False,
) -> None:
    """Continue a text with a run's newest checkpoint."""
    from megagpt import generate as verb

    _answer(verb.generate(run, prompt, tokens, temperature, top_k, top_p, seed), as_json)


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
    """Write a run's newest checkpoint, and its tokenizer, for other libraries."""
    from megagpt import export as verb

    _answer(verb.export(run, output, to, dtype), as_json)


@app.command(context_settings={"allow_interspersed_args": True})
def parity(
    recipe: Annotated[Path, typer.Option(help="what is trained; it is shrunk to seconds, all switches kept")],
    deepspeed_config: Config,
    overrides: Overrides = None,
    updates: Annotated[int, typer.Option(help="how many are compared", min=8)] = 20,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    """Does this layout, on these machines, train the same as one process? Start it as you will start training."""
    from megagpt import parity as verb

    raise typer.Exit(verb.parity(verb.Options(recipe, deepspeed_config, tuple(overrides or ()), updates)))


@app.command()
def checkpoints(
    run: Run,
    verify: Annotated[bool, typer.Option(help="read every byte")] = False,
    as_json: Json = False,
) -> None:
    """List a run's checkpoints: update, tokens, size, layout, and what is wrong with a damaged one."""
    from megagpt import checkpoints as verb

    _answer(verb.checkpoints(run, verify), as_json)


@app.command()
def stop(run: Run) -> None:
    """Ask a run that is training to save, and to exit 75."""
    from megagpt import checkpoints as verb

    print(verb.stop(run))


@app.command()
def hosts(
    file: Annotated[Path, typer.Argument(help="a hostfile, as `deepspeed --hostfile` reads it")],
    write_environment: Annotated[
        Path | None, typer.Option(help="write the variables that the other hosts need, for DS_ENV_FILE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a hostfile: every mistake with its line, else its hosts and ranks."""
    from megagpt import hosts as verb

    _answer(verb.hosts(file, write_environment, dict(os.environ)), as_json)


@app.command()
def status(run: Run, as_json: Json = False) -> None:
    """Is a run done (0), running (3), stopped to be started again (75), or failed (1, 2)? For job scripts."""
    from megagpt.run import status as standing

    found = standing.read(run)
    _answer(found, as_json)
    raise typer.Exit(found.code)


@app.command()
def report(run: Run) -> None:
    """Draw a run's loss curve here and as loss.svg in the run directory, and say where its time went."""
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
        print(error, file=sys.stderr)
        return error.exit_code
    except SystemExit as end:  # typer ends so, with 2 for a wrong option
        return end.code if isinstance(end.code, int) else EXIT_DONE
    return EXIT_DONE


def _answer(summary: Any, as_json: bool) -> None:
    """Print a verb's figures, for people or as JSON."""
    print(json.dumps(asdict(summary)) if as_json else str(summary))
