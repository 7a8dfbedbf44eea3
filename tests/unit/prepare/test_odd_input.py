"""Every kind of odd input as a real file: counted and told, and an error when strict."""

import json

import pytest

from megagpt.data import pieces
from megagpt.data.indexed import Reader
from megagpt.data.oddities import KINDS
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import UserError
from megagpt.prepare import Options, encoding, prepare_command
from tests.unit.prepare.conftest import jsonl

GOOD = jsonl(["good"]).encode()


def line(text):
    return json.dumps({"text": text}).encode() + b"\n"


# kind, the line that holds it, how often, what the corpus has of it (None: no document), what strict adds
ODD = [
    ("broken_json", b'{"text": }\n', 1, None, "Expecting value at column 10"),
    ("no_text", b"{}\n", 1, None, 'no key "text"'),
    ("not_a_string", b'{"text": ["a"]}\n', 1, None, 'it is ["a"]'),
    ("invalid_utf8", b'{"text": "\xff\xfe"}\n', 2, "\ufffd\ufffd", ""),
    ("lone_surrogates", line("\ud800 lone \udfff"), 2, "\ufffd lone \ufffd", ""),
    ("nul", line("\0a\0\0"), 3, "\0a\0\0", ""),
    ("lower_blocks", line("\u2581\u2581 a"), 2, "   a", ""),
    ("control_symbols", line("<eod> and <eod>"), 2, "<eod> and <eod>", ""),
    ("empty", line(""), 1, "", ""),
    ("blank", line(" \n\t"), 1, " \n\t", ""),
]


@pytest.mark.parametrize(("kind", "odd", "count", "kept", "detail"), ODD, ids=[row[0] for row in ODD])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_odd_line_is_counted_and_told_or_an_error(
    model, tmp_path, monkeypatch, kind, odd, count, kept, detail, workers
):
    monkeypatch.setattr(pieces, "_SMALLEST", 40)  # so that the line is counted over several pieces
    path = tmp_path / "a.jsonl"
    path.write_bytes(5 * GOOD + odd + 3 * GOOD)
    if workers == 1:
        summary = prepare_command([str(path)], model, tmp_path / "c", Options(0, workers))
        assert str(summary).splitlines()[3] == f"odd: {count} {KINDS[kind]} (first: {path}:6)"
        reader, tokenizer = Reader(tmp_path / "c.train"), Tokenizer(model)
        documents = [tokenizer.decode(reader.document(n)) for n in range(len(reader.documents) - 1)]
        assert documents == ["good"] * 5 + [kept] * (kept is not None) + ["good"] * 3
        assert all(tokenizer.eod not in reader.document(n)[:-1] for n in range(len(documents)))
    with pytest.raises(UserError) as error:
        prepare_command([str(path)], model, tmp_path / "s", Options(0, workers, strict=True))
    what = KINDS[kind].split(", ")[0] + (f": {detail}" if detail else "")
    assert str(error.value) == (
        f"megagpt: odd input: {what}\n  {path}:6\n  do: mend it, or leave out --strict to have such counted"
    )
    assert not list(tmp_path.glob("s.*.idx"))


def test_a_text_file_is_looked_at_as_well(model, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\n\0 \xff \xe2\x96\x81\n<eod>")
    summary = prepare_command([str(path)], model, tmp_path / "c", Options(0))
    kinds = ["invalid_utf8", "byte_order_marks", "nul", "lower_blocks", "control_symbols"]
    assert [(odd.kind, odd.count, odd.first) for odd in summary.oddities] == [(kind, 1, str(path)) for kind in kinds]


def test_a_document_too_long_for_one_sequence_becomes_several(model, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "MAX_SEQUENCE", 4)
    monkeypatch.setattr("megagpt.data.indexed_writer.MAX_SEQUENCE", 4)
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(["q", "qqqqqqqqqqqq", "z"]))
    summary = prepare_command([str(path)], model, tmp_path / "c", Options(0))
    reader, tokenizer = Reader(tmp_path / "c.train"), Tokenizer(model)
    assert max(reader.lengths) == 4
    assert tokenizer.decode(reader.document(1)) == "qqqqqqqqqqqq"
    assert [(odd.kind, odd.count, odd.first) for odd in summary.oddities] == [("long", 1, f"{path}:2")]


def test_the_summary_reads_well(model, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(GOOD + b"x\ny\n" + line(""))
    summary = prepare_command([str(path)], model, tmp_path / "c", Options(0))
    tokens = len(Reader(tmp_path / "c.train").tokens)
    assert str(summary) == "\n".join(
        [
            f"text from {path} (0.0 MB)",
            f"{tmp_path / 'c'}.train: 2 documents, {tokens} tokens, 0.00 MB, {4 / tokens:.2f} bytes per token",
            "unknown: 0.000% of tokens",
            f"odd: 2 lines that are not JSON, passed over (first: {path}:2)",
            f"odd: 1 empty documents, passed over (first: {path}:4)",
            f"prepared in {summary.seconds:.1f} s ({4e-6 / summary.seconds:.1f} MB/s)",
        ]
    )
