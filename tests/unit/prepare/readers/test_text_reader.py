import itertools
import json

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megagpt.errors import UserError
from megagpt.prepare import chunks as pieces
from megagpt.prepare.chunks import InputRange
from megagpt.prepare.input_warnings import InputError, InputLocation, InputWarnings
from megagpt.prepare.readers import reader
from megagpt.prepare.readers.documents import join_fragments
from megagpt.prepare.readers.inputs import find_input_files
from megagpt.prepare.readers.reader import read_fragments
from tests.unit.prepare.readers.whole import whole_documents

ANY_TEXT = st.text(st.characters(exclude_categories=()))


def jsonl(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def documents(*paths, warnings=None, key="text"):
    files = find_input_files([str(path) for path in paths], None)
    return [
        (document.name.split("/")[-1], document.text)
        for document in whole_documents(files, tuple(key.split(".")), warnings or InputWarnings())
    ]


def texts(*paths, **options):
    return [text for _, text in documents(*paths, **options)]


@given(texts=st.lists(ANY_TEXT), newline=st.sampled_from(["\n", "\r\n"]))
def test_jsonl_is_split_at_newlines_only(tmp_path_factory, texts, newline):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    # Not escaped, so that the file contains U+2028, \x85 and the like.
    lines = [json.dumps({"text": text}, ensure_ascii=any("\ud800" <= c <= "\udfff" for c in text)) for text in texts]
    path.write_bytes(newline.join([*lines, ""]).encode())
    assert [text for _, text in documents(path)] == texts


@given(lines=st.lists(st.text("ab\u2028é", max_size=8), max_size=30), size=st.integers(1, 40), ended=st.booleans())
@settings(max_examples=200)
def test_every_line_is_in_exactly_one_chunk(tmp_path_factory, lines, size, ended):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    content = "\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines) + ("\n" if ended else "")
    path.write_text(content, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_MIN_BYTES", size)
        chunks = pieces.split_into_chunks(find_input_files([str(path)], None))
    warnings = InputWarnings()
    found = [f.text for chunk in chunks for part in chunk.ranges for f in read_fragments(part, ("text",), warnings)]
    assert found == lines
    assert len(chunks) == max(1, -(-len(content.encode()) // size))


def test_small_files_share_a_chunk_and_a_text_file_is_never_split(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_MIN_BYTES", 100)
    for name, size in (("a.txt", 40), ("b.txt", 60), ("c.txt", 1), ("d.txt", 500), ("e.jsonl", 150)):
        (tmp_path / name).write_bytes(b"x" * size)
    chunks = pieces.split_into_chunks(find_input_files([str(tmp_path)], None))
    spans = [[(part.file.path[-6:], part.start, part.end) for part in chunk.ranges] for chunk in chunks]
    assert spans == [
        [("/a.txt", 0, None), ("/b.txt", 0, None)],
        [("/c.txt", 0, None)],
        [("/d.txt", 0, None)],
        [(".jsonl", 0, 100)],
        [(".jsonl", 100, 150)],
    ]
    assert [chunk.number for chunk in chunks] == [0, 1, 2, 3, 4]
    assert str(chunks[0]) == f"{tmp_path}/a.txt and the next 1 file"
    assert str(chunks[3]) == f"{tmp_path}/e.jsonl, bytes 0 to 100"


@given(text=st.text(st.sampled_from("ab \n\u2581é👩")), block=st.integers(1, 7), broken=st.integers(0, 3))
@settings(max_examples=300)
def test_the_fragments_of_a_text_join_to_the_text(tmp_path_factory, text, block, broken):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    raw = text.encode() + b"\xf0\x9f\x91"[:broken]
    path.write_bytes(raw)
    warnings = InputWarnings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_BLOCK", block)
        (chunk,) = pieces.split_into_chunks(find_input_files([str(path)], None))
        fragments = list(read_fragments(chunk.ranges[0], ("text",), warnings))
    assert "".join(fragment.text for fragment in fragments) == raw.decode(errors="replace")
    assert [fragment.is_last for fragment in fragments] == [False] * (len(fragments) - 1) + [True]
    for fragment, after in itertools.pairwise(fragments):
        # A split is never within a word or between spaces.
        assert fragment.text[-1] == "\n" or (fragment.text[-1] not in " \u2581" and after.text[0] == " ")
    assert warnings.counts.get("invalid_utf8", 0) == (1 if broken else 0)


@given(
    text=st.text(st.sampled_from("ab \n\u2581é👩")), block=st.integers(1, 7), kind=st.sampled_from(["jsonl", "parquet"])
)
def test_a_long_text_in_a_line_or_row_is_read_in_fragments(tmp_path_factory, text, block, kind):
    path = tmp_path_factory.mktemp("text") / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.table({"text": ["one", text, "two"]}), path)
    else:
        path.write_bytes(jsonl("one", text, "two"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_BLOCK", block)
        fragments = list(
            read_fragments(InputRange(0, find_input_files([str(path)], None)[0]), ("text",), InputWarnings())
        )
    assert [(one.text, one.line) for one in join_fragments(fragments)] == [("one", 1), (text, 2), ("two", 3)]
    fragments = [fragment for fragment in fragments if fragment.line == 2]
    for fragment, after in itertools.pairwise(fragments):
        assert fragment.text[-1] == "\n" or (fragment.text[-1] not in " \u2581" and after.text[0] == " ")
    if "\n" in text[:-1] and len(text) > block:
        assert len(fragments) > 1


def test_byte_order_marks_and_empty_lines_are_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl("one") + b"\n  \n" + jsonl("two"))
    warnings = InputWarnings()
    assert documents(tmp_path, warnings=warnings) == [("a.txt", "hello"), ("b.jsonl:1", "one"), ("b.jsonl:4", "two")]
    assert warnings.counts == {"byte_order_marks": 2}
    assert warnings.lines == {1: 4}


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xff\xef\xbf\xbd")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}\n' + jsonl("fine"))
    warnings = InputWarnings()
    assert texts(tmp_path, warnings=warnings) == ["caf\ufffd \ufffd\ufffd", "\ufffd", "fine"]
    assert warnings.counts == {"invalid_utf8": 3}
    assert warnings.first == {"invalid_utf8": InputLocation(0, 0)}


BROKEN = [
    (b'{"text": }', "broken_json", "Expecting value at column 10"),
    (b"[" * 100_000, "broken_json", "nested too deeply"),
    (b'{"text": ' + b"1" * 5000 + b"}", "broken_json", "Exceeds the limit (4300 digits) for integer string conversion"),
    (b"[1]", "no_text", 'no key "text"'),
    (b'{"body": "x"}', "no_text", 'no key "text"'),
    (b'{"text": 5}', "not_a_string", "it is 5"),
    (b'{"text": null}', "not_a_string", "it is null"),
]


@pytest.mark.parametrize(("line", "kind", "detail"), BROKEN)
def test_an_invalid_line_is_skipped_and_counted_and_an_error_when_strict(tmp_path, line, kind, detail):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl("good") + line + b"\n" + jsonl("better"))
    warnings = InputWarnings()
    assert texts(path, warnings=warnings) == ["good", "better"]
    assert (warnings.counts, warnings.first) == ({kind: 1}, {kind: InputLocation(0, 2)})
    with pytest.raises(InputError) as error:
        texts(path, warnings=InputWarnings(strict=True))
    assert (error.value.kind, error.value.location) == (kind, InputLocation(0, 2))
    assert error.value.detail.startswith(detail)


def test_the_text_may_be_within_nested_keys(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": {"b": "deep"}}\n{"a": "b"}\n{"a": {"b": {}}}\n')
    warnings = InputWarnings()
    assert texts(tmp_path / "a.jsonl", key="a.b", warnings=warnings) == ["deep"]
    assert warnings.counts == {"no_text": 1, "not_a_string": 1}


def test_the_error_names_a_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl("x"))
    (chunk,) = pieces.split_into_chunks(find_input_files([str(path)], None))
    path.unlink()
    with pytest.raises(UserError) as error:
        list(read_fragments(chunk.ranges[0], ("text",), InputWarnings()))
    assert str(error.value) == (
        f"megagpt: cannot read the file: No such file or directory\n  {path}\n"
        "  do: check that it exists and that you have permission to read it"
    )


def test_lines_beyond_four_gigabytes_are_found(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:  # sparse: a line of 4 GB that is never read
        file.write(jsonl("first"))
        file.seek(2**32)
        file.write(b"\n" + jsonl("second", "third"))
    (file,) = find_input_files([str(path)], None)
    chunks = pieces.split_into_chunks([file])
    ranges = [part for chunk in chunks for part in chunk.ranges]
    assert [part.start for part in ranges[1:]] == [part.end for part in ranges[:-1]]
    assert (ranges[0].start, ranges[-1].end) == (0, file.size)
    assert ranges[-1].start <= 2**32 < ranges[-1].end
    beyond = pieces.InputRange(0, file, 2**32, file.size)
    assert [fragment.text for fragment in read_fragments(beyond, ("text",), InputWarnings())] == ["second", "third"]
