"""A long JSON line is read with the same result as json.loads gives."""

import json
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.errors import MachineError
from megagpt.prepare.chunks import InputRange
from megagpt.prepare.input_warnings import InputError, InputWarnings
from megagpt.prepare.readers import long_json_line, reader
from megagpt.prepare.readers.documents import join_fragments
from megagpt.prepare.readers.inputs import find_input_files
from megagpt.prepare.readers.long_json_line import LongJsonLine
from megagpt.prepare.readers.reader import read_fragments

UNITS = [
    *(b"abc ", b" ", "é".encode(), "中文".encode(), "👩".encode(), b"\xe2\x96\x81"),
    *(rb"\n", rb"\t", rb"\"", rb"\\", rb"\/", rb"\b", rb"\u0041", rb"\u4e2d", rb"\u0000", rb"\\ud83d"),
    *(rb"\ud83d\ude00", rb"\ud83d", rb"\uDE00", rb"\uD83D\n", rb"\ud83d\ud83d", rb"\u0022", rb"\u005c"),
    *(b"\xff", b"\xf0\x9f", b"\xed\xa0\xbd", b"\xef\xbf\xbd"),
]
BROKEN = [rb"\x", rb"\u12", rb"\u12g4", rb"\ud83d\u12", b"\x01", b"\t", b"\\"]
string = st.lists(st.sampled_from(UNITS), max_size=40).map(lambda units: b'"' + b"".join(units) + b'"')
broken_string = st.lists(st.sampled_from(UNITS + BROKEN), max_size=40).map(lambda units: b'"' + b"".join(units) + b'"')
name = st.sampled_from([b'"text"', b'"a"', b'"b"', rb'"\u0061"', b'"other"'])
scalar = st.sampled_from([b"1", b"-2.5e3", b"null", b"true", b"NaN", b"1" * 50, b"[]", b"{}"])


def objects(values):
    pair = st.tuples(name, st.sampled_from([b":", b" : "]), values).map(b"".join)
    return st.lists(pair, max_size=4).map(lambda pairs: b"{" + b", ".join(pairs) + b"}")


def lists(values):
    return st.lists(values, max_size=4).map(lambda items: b"[" + b",".join(items) + b"]")


def documents(strings):
    return objects(st.recursive(strings | scalar, lambda values: objects(values) | lists(values), max_leaves=6))


@st.composite
def lines(draw):
    """JSON objects: valid, invalid, with random changes, and truncated."""
    line = draw(documents(string) | documents(broken_string))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at = draw(st.integers(0, len(line)))
        line = line[:at] + draw(st.sampled_from([b"", b'"', b"\\", b",", b"}", b"x", b"\xff"])) + line[at + 1 :]
    return draw(st.sampled_from([line, line, line[: len(line) // 2]]))


def found(path, key, strict):
    """Documents and oddities; of those that are errors, the first."""
    warnings = InputWarnings(strict)
    try:
        fragments = list(
            read_fragments(InputRange(0, find_input_files([str(path)], None)[0]), tuple(key.split(".")), warnings)
        )
    except InputError as error:
        # The detail of a long string shows only its head, of a short one possibly more.
        return error.kind, error.location, error.kind == "not_a_string" or error.detail
    assert all(fragment.is_last for fragment in join_fragments(fragments))
    return [(one.text, one.line) for one in join_fragments(fragments)], warnings


def text_of(line, key):
    """Return the text that the json module alone finds in a line."""
    try:
        value = json.loads(line.decode(errors="replace"))
        for one in key.split("."):
            value = value[one]
    except (ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, str) else None


@given(
    line=lines(),
    key=st.sampled_from(["text", "a", "a.b", "a.a.b"]),
    block=st.integers(1, 40),
    long=st.integers(6, 40),  # no key is longer
    end=st.sampled_from([b"\n", b"\r\n", b""]),
    strict=st.booleans(),
)
@settings(max_examples=int(__import__("os").environ.get("EX", "300")), deadline=None)
def test_a_long_line_is_read_like_a_short_one(tmp_path_factory, line, key, block, long, end, strict):
    path = tmp_path_factory.getbasetemp() / "a.jsonl"
    before = b'{"text": "first"}\n'
    path.write_bytes(before + line + end + (before if end else b""))
    expected = found(path, key, strict)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_MAX_LINE", 3)
        patch.setattr(long_json_line, "BLOCK_BYTES", block)
        patch.setattr(long_json_line, "_MAX_INLINE", long)
        assert found(path, key, strict) == expected
    if not strict:
        text = text_of(line, key)
        assert [one for one, number in expected[0] if number == 2] == ([] if text is None else [text])


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        (b'{"text": ["%s"]}', 'it is ["\\\\4e2d\\\\4e2d\\\\4e2d\\\\4e2d\\\\4e'),
        (b'{"text": "%s" 1}', "Expecting ',' delimiter at column 6291469"),
        (b'{"text": "%s', "Unterminated string starting at column 10"),
        (rb'{"a": "%s", "text": "%s\x"}', "Invalid \\escape at column 12582932"),
    ],
)
def test_errors_of_a_long_line_are_those_of_a_short_one(tmp_path, monkeypatch, line, detail):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line.replace(b"%s", rb"\\4e2d" * (1 << 20)) + b"\n")
    assert found(path, "text", strict=False)[0] == []
    with pytest.raises(InputError) as error:
        list(read_fragments(InputRange(0, find_input_files([str(path)], None)[0]), ("text",), InputWarnings(True)))
    assert error.value.detail == detail
    monkeypatch.setattr(reader, "_MAX_LINE", 1 << 30)
    with pytest.raises(InputError) as error:
        list(read_fragments(InputRange(0, find_input_files([str(path)], None)[0]), ("text",), InputWarnings(True)))
    assert error.value.detail == detail


def test_long_strings_are_stored_on_disk(tmp_path):
    """Only the heads and markers of the strings of a 20 MB line, and one block, are in memory."""
    text = "\\u4e2d\\ud83d\\ude00 \\\\x" * 500_000
    path = tmp_path / "line"
    path.write_text(f'{{"text": "{text}", "list": ["{text}", 1, "{text}"]}}\n')
    with path.open("rb") as file, LongJsonLine(file.readline(100), file, tmp_path) as line:
        assert len(line.skeleton) < 1200
        assert line.size == path.stat().st_size
        value = json.loads(line.skeleton)
        for one in (value["text"], *value["list"][::2]):
            blocks = list(line.read_string(one))
            assert "".join(blocks) == "中😀 \\x" * 500_000
            assert max(map(len, blocks)) <= long_json_line.BLOCK_BYTES
        assert list(tmp_path.iterdir()) == [path]  # the file has no name


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "word " * 2_000_000}) + "\n")
    store = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115, closed by the reader
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: store)
    with pytest.raises(MachineError) as error:
        list(
            read_fragments(InputRange(0, find_input_files([str(path)], None)[0]), ("text",), InputWarnings(), tmp_path)
        )
    assert str(error.value) == (
        "megagpt: cannot store the text of a long line: No space left on device\n"
        f"  {tmp_path}\n  do: free space there, then run the command again"
    )
    assert store.closed
