import gzip
import json

import pytest

from megagpt.cli import main
from megagpt.prepare.command import inspect_tokenizer, train_tokenizer_command
from megagpt.tokenizer.tokenizer import Tokenizer
from tests.unit.prepare.conftest import finish, jsonl


def test_quality_is_measured_on_unseen_text_if_there_is_any(texts, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(jsonl(texts))
    unseen = train_tokenizer_command([str(path)], 400, tmp_path / "a", 0.5).quality
    seen = train_tokenizer_command([str(path)], 400, tmp_path / "b", 0.0).quality
    assert (unseen.seen, seen.seen) == (False, True)
    assert seen.documents == len(texts)
    assert 0 < unseen.documents < len(texts)
    assert seen.text_bytes == sum(len(text.encode()) for text in texts)
    model = Tokenizer(tmp_path / "b.model")
    assert seen.bytes_per_token == pytest.approx(seen.text_bytes / sum(len(model.encode(text)) for text in texts))
    assert (seen.unknown, seen.lost) == (0.0, 0)


def test_the_tokenizer_is_trained_on_a_sample_and_does_not_depend_on_the_workers(command, texts, tmp_path, monkeypatch):
    """Files of lines, compressed or not, and a text file; the sample is a fifth of them."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jsonl").write_text(jsonl([f"word{number} {text}" for text in texts]))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "1.jsonl").read_bytes()))
    (folder / "b.txt").write_text("\n".join(texts))
    size = sum(len(text.encode()) for text in texts)
    monkeypatch.setenv("SAMPLE", str(size))
    made = []
    for workers in (1, 3):
        options = ("--vocab-size", 400, "--output", tmp_path / f"t{workers}", "--workers", workers, "--json")
        summary = json.loads(finish(command("tokenizer", "train", folder, *options, chunk=2000))[0])
        made.append((summary | {"path": "", "seconds": 0}, (tmp_path / f"t{workers}.model").read_bytes()))
    assert made[0] == made[1]
    monkeypatch.setenv("SAMPLE", str(10 * size))
    finish(command("tokenizer", "train", folder, "--vocab-size", 400, "--output", tmp_path / "all", chunk=2000))
    assert (tmp_path / "all.model").read_bytes() != made[0][1]


def test_the_error_of_a_worker_names_what_cannot_be_read(command, texts, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text(jsonl(texts))
    (tmp_path / "3.jsonl.gz").write_bytes(gzip.compress(jsonl(texts).encode())[:-9])
    options = ("--vocab-size", 400, "--output", tmp_path / "t", "--workers", 2)
    _, errors = finish(command("tokenizer", "train", tmp_path, *options, chunk=2000), 2)
    what, where, _ = errors.splitlines()
    assert what.startswith("megagpt: the compressed file is damaged or truncated: ")
    assert where == f"  {tmp_path}/3.jsonl.gz"
    assert not (tmp_path / "t.model").exists()


def test_texts_that_do_not_decode_to_themselves_are_counted(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(jsonl(["plain words of text", "a lower block \u2581 here"] * 3))
    summary = train_tokenizer_command([str(path)], 300, tmp_path / "t", 0.0)
    assert summary.quality.lost == 3
    assert "3 of 6 documents do not decode to their text" in str(summary)


def test_the_tokens_of_a_text_are_shown(model, capsys):
    text = "the people\nand 中"
    tokens = inspect_tokenizer(model, text)
    assert [number for number, _ in tokens.tokens] == Tokenizer(model).encode(text)
    assert "".join(part for _, part in tokens.tokens if part != "\ufffd") == "the people\nand "
    assert main(["tokenizer", "inspect", model, text, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == [list(token) for token in tokens.tokens]
    assert main(["tokenizer", "inspect", model, "the people"]) == 0
    cut, figures = capsys.readouterr().out.splitlines()
    count = len(Tokenizer(model).encode("the people"))
    assert cut.replace("|", "") == "the people"
    assert figures == f"{count} tokens, {10 / count:.2f} bytes per token"
    colored = tokens.colored()
    assert colored.plain.startswith("the people⏎\nand ")
    assert len({span.style for span in colored.spans}) > 1
