"""Every kind of unusual input in a real file: counted and reported, and an error with --strict."""

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from megagpt.corpus.reader import CorpusReader
from megagpt.errors import UserError
from megagpt.prepare import chunks, encode
from megagpt.prepare.command import PrepareOptions, prepare_command
from megagpt.prepare.input_warnings import WARNING_KINDS
from megagpt.tokenizer.tokenizer import Tokenizer
from tests.unit.prepare.conftest import jsonl

GOOD = jsonl(["good"]).encode()


def line(text):
    return json.dumps({"text": text}).encode() + b"\n"


STRICT = "  do: correct the input, or omit --strict to count such input as a warning"
# kind, the line, the number of warnings, the text in the corpus (None: no document), the detail of the error
UNUSUAL_LINES = [
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


@pytest.mark.parametrize(
    ("kind", "unusual", "count", "kept", "detail"), UNUSUAL_LINES, ids=[row[0] for row in UNUSUAL_LINES]
)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_unusual_line_is_counted_and_reported_and_an_error_with_strict(
    model, tmp_path, monkeypatch, kind, unusual, count, kept, detail, workers
):
    monkeypatch.setattr(chunks, "_MIN_BYTES", 40)  # so that line numbers are counted over several chunks
    path = tmp_path / "a.jsonl"
    path.write_bytes(5 * GOOD + unusual + 3 * GOOD)
    if workers == 1:
        summary = prepare_command([str(path)], model, tmp_path / "c", PrepareOptions(0, workers))
        assert str(summary).splitlines()[3] == f"warning: {WARNING_KINDS[kind]}: {count} (first: {path}:6)"
        reader, tokenizer = CorpusReader(tmp_path / "c.train"), Tokenizer(model)
        documents = [tokenizer.decode(reader.document(n)) for n in range(len(reader.documents) - 1)]
        assert documents == ["good"] * 5 + [kept] * (kept is not None) + ["good"] * 3
        assert all(tokenizer.eod not in reader.document(n)[:-1] for n in range(len(documents)))
    with pytest.raises(UserError) as error:
        prepare_command([str(path)], model, tmp_path / "s", PrepareOptions(0, workers, strict=True))
    what = WARNING_KINDS[kind].split(", ")[0] + (f": {detail}" if detail else "")
    assert str(error.value) == (f"megagpt: unusual input: {what}\n  {path}:6\n{STRICT}")
    assert not list(tmp_path.glob("s.*.idx"))


def strict_error(path, model, prefix, **options):
    """Return the error message for the first unusual input with --strict."""
    with pytest.raises(UserError) as error:
        prepare_command([str(path)], model, prefix, PrepareOptions(0, 1, strict=True, **options))
    assert not list(prefix.parent.glob(f"{prefix.name}.*.idx"))
    return str(error.value)


def texts_of(prefix, model):
    reader, tokenizer = CorpusReader(f"{prefix}.train"), Tokenizer(model)
    return [tokenizer.decode(reader.document(number)) for number in range(len(reader.documents) - 1)]


def test_a_byte_order_mark_before_lines_is_removed_and_reported(model, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD * 2)
    summary = prepare_command([str(path)], model, tmp_path / "c", PrepareOptions(0))
    assert str(summary).splitlines()[3] == f"warning: {WARNING_KINDS['byte_order_marks']}: 1 (first: {path}:1)"
    assert texts_of(tmp_path / "c", model) == ["good", "good"]
    assert strict_error(path, model, tmp_path / "s") == (
        f"megagpt: unusual input: byte order marks at the start of a file\n  {path}:1\n{STRICT}"
    )


TEXTS = [
    ("byte_order_marks", b"\xef\xbb\xbfgood", "good"),
    ("invalid_utf8", b"caf\xe9", "caf\ufffd"),
    ("nul", b"a\0", "a\0"),
    ("lower_blocks", b"a \xe2\x96\x81b", "a  b"),
    ("control_symbols", b"a <eod>", "a <eod>"),
    ("blank", b" \n", " \n"),
]


@pytest.mark.parametrize(("kind", "content", "kept"), TEXTS, ids=[row[0] for row in TEXTS])
def test_unusual_text_files_are_reported(model, tmp_path, kind, content, kept):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    summary = prepare_command([str(path)], model, tmp_path / "c", PrepareOptions(0))
    assert str(summary).splitlines()[3] == f"warning: {WARNING_KINDS[kind]}: 1 (first: {path})"
    assert texts_of(tmp_path / "c", model) == [kept]
    assert strict_error(path, model, tmp_path / "s") == (
        f"megagpt: unusual input: {WARNING_KINDS[kind].split(', ')[0]}\n  {path}\n{STRICT}"
    )


def table(path, column):
    parquet.write_table(pyarrow.table({"text": column, "id": range(len(column))}), path, row_group_size=2)
    return path


def not_utf8(*raws):
    """Return a string column without checking that its bytes are UTF-8."""
    return pyarrow.Array.from_buffers(pyarrow.string(), len(raws), pyarrow.array(raws, pyarrow.binary()).buffers())


ROWS = [
    ("no_text", ["a", "b", "c", None], "abc", 'no key "text"'),
    ("not_a_string", [["a"], ["b"]], "", 'it is ["a"]'),
    ("invalid_utf8", not_utf8(b"a", b"b", b"c", b"\xff\xef\xbf\xbd"), "abc\ufffd\ufffd", ""),
    ("nul", ["a", "b", "c", "\0"], "abc\0", ""),
    ("empty", ["a", "b", "c", ""], "abc", ""),
]


@pytest.mark.parametrize(("kind", "column", "kept", "detail"), ROWS, ids=[row[0] for row in ROWS])
def test_unusual_rows_of_a_table_are_reported(model, tmp_path, kind, column, kept, detail):
    path = table(tmp_path / "a.parquet", column)
    (tmp_path / "b.txt").write_text("z")
    summary = prepare_command([str(path), str(tmp_path / "b.txt")], model, tmp_path / "c", PrepareOptions(0))
    row, count = (1, 2) if kind == "not_a_string" else (4, 1)
    assert str(summary).splitlines()[3] == f"warning: {WARNING_KINDS[kind]}: {count} (first: {path}:{row})"
    assert "".join(texts_of(tmp_path / "c", model)) == kept + "z"
    what = WARNING_KINDS[kind].split(", ")[0] + (f": {detail}" if detail else "")
    assert strict_error(path, model, tmp_path / "s") == f"megagpt: unusual input: {what}\n  {path}:{row}\n{STRICT}"


def test_unusual_lines_of_a_compressed_file_are_reported(model, tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 2) + gzip.compress(line("\ud800")))
    summary = prepare_command([str(path)], model, tmp_path / "c", PrepareOptions(0))
    assert [(warning.kind, warning.count, warning.first) for warning in summary.oddities] == [
        ("lone_surrogates", 1, f"{path}:3")
    ]
    assert strict_error(path, model, tmp_path / "s") == f"megagpt: unusual input: lone surrogates\n  {path}:3\n{STRICT}"


def test_the_error_names_a_damaged_table_and_not_the_output(model, tmp_path):
    path = tmp_path / "a.parquet"
    column = [f"{number} text {number * number}" for number in range(3000)]
    parquet.write_table(pyarrow.table({"text": column}), path, use_dictionary=False)
    raw = bytearray(path.read_bytes())
    raw[20_000:22_000] = bytes(byte ^ 0x5A for byte in raw[20_000:22_000])
    path.write_bytes(raw)
    with pytest.raises(UserError) as error:
        prepare_command([str(path)], model, tmp_path / "c", PrepareOptions(0, 1))
    what, where, do = str(error.value).splitlines()
    assert what.startswith("megagpt: cannot read the parquet file: ")
    assert (where, do) == (f"  {path}", "  do: copy or create it again")


def test_a_text_file_can_have_several_warnings(model, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\n\0 \xff \xe2\x96\x81\n<eod>")
    summary = prepare_command([str(path)], model, tmp_path / "c", PrepareOptions(0))
    kinds = ["invalid_utf8", "byte_order_marks", "nul", "lower_blocks", "control_symbols"]
    assert [(warning.kind, warning.count, warning.first) for warning in summary.oddities] == [
        (kind, 1, str(path)) for kind in kinds
    ]


def test_a_document_too_long_for_one_sequence_is_reported_and_an_error_with_strict(model, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "MAX_SEQUENCE", 4)
    monkeypatch.setattr("megagpt.corpus.writer.MAX_SEQUENCE", 4)
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(["q", "qqqqqqqqqqqq", "z"]))
    summary = prepare_command([str(path)], model, tmp_path / "c", PrepareOptions(0))
    reader, tokenizer = CorpusReader(tmp_path / "c.train"), Tokenizer(model)
    assert max(reader.lengths) == 4
    assert tokenizer.decode(reader.document(1)) == "qqqqqqqqqqqq"
    assert [(warning.kind, warning.count, warning.first) for warning in summary.oddities] == [("long", 1, f"{path}:2")]
    assert strict_error(path, model, tmp_path / "s") == (
        f"megagpt: unusual input: documents of more than 2³¹ tokens\n  {path}:2\n{STRICT}"
    )


def test_the_summary_lists_all_warnings(model, tmp_path):
    path = tmp_path / "unusual.jsonl"
    path.write_bytes(GOOD + b"x\ny\n" + line(""))
    summary = prepare_command([str(path)], model, tmp_path / "c", PrepareOptions(0))
    tokens = len(CorpusReader(tmp_path / "c.train").tokens)
    assert str(summary) == "\n".join(
        [
            f"text from {path} (0.0 MB)",
            f"{tmp_path / 'c'}.train: 2 documents, {tokens} tokens, 0.00 MB, {4 / tokens:.2f} bytes per token",
            "unknown: 0.000% of tokens",
            f"warning: lines that are not valid JSON, skipped: 2 (first: {path}:2)",
            f"warning: empty documents, which have no tokens: 1 (first: {path}:4)",
            f"prepared in {summary.seconds:.1f} s ({4e-6 / summary.seconds:.1f} MB/s)",
        ]
    )
