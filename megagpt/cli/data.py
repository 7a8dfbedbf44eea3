"""Subcommands for data: `megagpt prepare`, `megagpt tokenizer …` and `megagpt data …`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megagpt.cli.options import Inputs, Json, Prefix, TextKey, Workers, finite, print_result
from megagpt.errors import EXIT_FAILURE
from megagpt.prepare.readers.documents import DEFAULT_VALIDATION_FRACTION

app = typer.Typer()
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train a tokenizer, or inspect one.", rich_markup_mode=None)
data_app = typer.Typer(no_args_is_help=True, help="Inspect, verify and merge corpora.", rich_markup_mode=None)


@app.command()
def prepare(
    inputs: Inputs,
    tokenizer: Annotated[
        Path, typer.Option(help="a sentencepiece .model, a tokenizer.json, or the name of a tiktoken encoding")
    ],
    output: Annotated[Path, typer.Option(help="PREFIX of PREFIX.train.* and PREFIX.validation.*")],
    validation_fraction: Annotated[
        float, typer.Option(help="fraction of the documents held out for validation", callback=finite)
    ] = DEFAULT_VALIDATION_FRACTION,
    workers: Workers = None,
    text_key: TextKey = "text",
    strict: Annotated[bool, typer.Option("--strict", help="fail on the first malformed document")] = False,
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="drop exact copies of documents")] = False,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="shuffle the documents, in the same order every time")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="sentencepiece, or gigatoken, which gives the same ids and is several times faster")
    ] = "sentencepiece",
    pack: Annotated[int | None, typer.Option(help="pack whole documents into samples of SEQ_LEN tokens", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Turn text into a memory-mapped corpus (.bin, .idx, .json). Run the same command again to resume it."""
    from megagpt.prepare import command as implementation

    options = implementation.PrepareOptions(
        validation_fraction, workers, text_key, strict, deduplicate, shuffle, engine, pack
    )
    result = implementation.prepare_corpora(inputs, tokenizer, output, options, sys.stderr)
    if result:  # Under a launcher, only one rank has the result.
        print_result(result.corpora[0] if len(result.corpora) == 1 else result, as_json)


@tokenizer_app.command("train")
def train_tokenizer(
    inputs: Inputs,
    output: Annotated[Path, typer.Option(help="PREFIX: writes PREFIX.model")],
    vocab_size: Annotated[int, typer.Option(help="number of tokens, special tokens included", min=1)] = 32_000,
    text_key: TextKey = "text",
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Train a lossless sentencepiece tokenizer on text."""
    from megagpt.prepare import command as implementation

    result = implementation.train_tokenizer_command(inputs, vocab_size, output, text_key=text_key, workers=workers)
    print_result(result, as_json)


@tokenizer_app.command("inspect")
def inspect_tokenizer(
    tokenizer: Annotated[Path, typer.Argument(help="a tokenizer, in any form that `prepare` accepts")],
    text: Annotated[str, typer.Argument(help="text to tokenize; `-` reads standard input")],
    as_json: Json = False,
) -> None:
    """Show how a text is split into tokens."""
    from megagpt.prepare import command as implementation

    tokens = implementation.inspect_tokenizer(tokenizer, sys.stdin.read() if text == "-" else text)
    if sys.stdout.isatty() and not as_json:
        from rich.console import Console

        Console().print(tokens.colored())
    else:
        print_result(tokens, as_json)


@data_app.command("inspect")
def inspect_data(
    prefix: Prefix,
    document: Annotated[list[int] | None, typer.Option(help="show this document (repeatable)")] = None,
    sample: Annotated[int, typer.Option(help="show this many documents, evenly spaced", min=0)] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="show documents as text instead of ids")] = None,
    as_json: Json = False,
) -> None:
    """Show the statistics of a corpus, how it was made, and some of its documents."""
    from megagpt.corpus import inspect as implementation

    print_result(implementation.inspect(prefix, document or (), sample, tokenizer), as_json)


@data_app.command("verify")
def verify_data(
    prefix: Prefix,
    workers: Annotated[int | None, typer.Option(help="threads; default: one per core", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Read and check a whole corpus: index, ids, checksums. The exit code is 1 if anything is wrong."""
    from megagpt.corpus import verify as implementation

    verification = implementation.verify(prefix, workers)
    print_result(verification, as_json)
    if verification.wrong:
        raise typer.Exit(EXIT_FAILURE)


@data_app.command("merge")
def merge_data(
    prefixes: Annotated[list[str], typer.Argument(help="corpora, in the order of the result")],
    output: Annotated[str, typer.Option(help="PREFIX of the merged corpus")],
    as_json: Json = False,
) -> None:
    """Merge several corpora of the same tokenizer into one."""
    from megagpt.corpus import merge as implementation

    print_result(implementation.merge(prefixes, output), as_json)
