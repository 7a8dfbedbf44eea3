import json

import pytest

from megagpt.cli import main
from megagpt.data.tokenizer import Tokenizer
from megagpt.prepare import inspect_tokenizer, train_tokenizer_command
from tests.unit.prepare.conftest import jsonl


def test_quality_is_measured_on_unseen_text_where_there_is_some(texts, tmp_path):
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


def test_a_text_that_does_not_come_back_is_told(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(jsonl(["plain words of text", "a lower block \u2581 here"] * 3))
    summary = train_tokenizer_command([str(path)], 300, tmp_path / "t", 0.0)
    assert summary.quality.lost == 3
    assert "3 of 6 documents do not come back" in str(summary)


def test_a_text_is_shown_in_tokens(model, capsys):
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
    coloured = tokens.coloured()
    assert coloured.plain.startswith("the people⏎\nand ")
    assert len({span.style for span in coloured.spans}) > 1
