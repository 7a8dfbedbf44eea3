"""`megagpt tokenizer …` and `megagpt data …`: the commands that have commands below them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megagpt.commands import Inputs, Json, Prefix, TextKey, Workers, answer
from megagpt.errors import EXIT_FAILURE

tokenizer_app = typer.Typer(no_args_is_help=True, help="Train a tokenizer, or look at one.", rich_markup_mode=None)
data_app = typer.Typer(no_args_is_help=True, help="Look into, verify and merge corpora.", rich_markup_mode=None)


@tokenizer_app.command("train")
def train_tokenizer(
    inputs: Inputs,
    output: Annotated[Path, typer.Option(help="PREFIX: writes PREFIX.model")],
    vocab_size: Annotated[int, typer.Option(help="pieces, all special ones included")] = 32_000,
    text_key: TextKey = "text",
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Train a lossless sentencepiece tokenizer on text."""
    from megagpt import prepare

    answer(prepare.train_tokenizer_command(inputs, vocab_size, output, text_key=text_key, workers=workers), as_json)


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

        Console().print(tokens.colored())
    else:
        answer(tokens, as_json)


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

    answer(corpora.inspect(prefix, document or (), sample, tokenizer), as_json)


@data_app.command("verify")
def verify_data(
    prefix: Prefix,
    workers: Annotated[int | None, typer.Option(help="threads; as many as there are cores", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Read and check all of a corpus: index, ids, checksums. Exit code 1 if something is wrong."""
    from megagpt import corpora

    verification = corpora.verify(prefix, workers)
    answer(verification, as_json)
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

    answer(corpora.merge(prefixes, output), as_json)
