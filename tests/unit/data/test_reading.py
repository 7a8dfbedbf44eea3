import itertools
import json

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megagpt.data import pieces, reading
from megagpt.data.documents import join_fragments
from megagpt.data.oddities import InputError, InputLocation, InputWarnings
from megagpt.data.pieces import InputRange
from megagpt.data.reading import read_fragments
from megagpt.data.sources import find_input_files
from megagpt.errors import UserError
from tests.unit.data.whole import whole_documents

ANY_TEXT = st.text(st.characters(exclude_categories=()))


def jsonl(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def documents(*paths, odd=None, key="text"):
    sources = find_input_files([str(path) for path in paths], None)
    return [
        (document.name.split("/")[-1], document.text)
        for document in whole_documents(sources, tuple(key.split(".")), odd or InputWarnings())
    ]


def texts(*paths, **options):
    return [text for _, text in documents(*paths, **options)]


@given(texts=st.lists(ANY_TEXT), newline=st.sampled_from(["\n", "\r\n"]))
def test_jsonl_is_cut_at_newlines_only(tmp_path_factory, texts, newline):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    # Unescaped, so that U+2028, \x85 and their like stand in the file as they are.
    lines = [json.dumps({"text": text}, ensure_ascii=any("\ud800" <= c <= "\udfff" for c in text)) for text in texts]
    path.write_bytes(newline.join([*lines, ""]).encode())
    assert [text for _, text in documents(path)] == texts


@given(lines=st.lists(st.text("ab\u2028é", max_size=8), max_size=30), size=st.integers(1, 40), ended=st.booleans())
@settings(max_examples=200)
def test_every_line_is_in_one_piece_however_a_file_is_cut(tmp_path_factory, lines, size, ended):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    content = "\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines) + ("\n" if ended else "")
    path.write_text(content, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_SMALLEST", size)
        cut = pieces.split_into_chunks(find_input_files([str(path)], None))
    odd = InputWarnings()
    found = [f.text for piece in cut for stretch in piece.stretches for f in read_fragments(stretch, ("text",), odd)]
    assert found == lines
    assert len(cut) == max(1, -(-len(content.encode()) // size))


def test_small_files_share_a_piece_and_a_large_text_is_never_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_SMALLEST", 100)
    for name, size in (("a.txt", 40), ("b.txt", 60), ("c.txt", 1), ("d.txt", 500), ("e.jsonl", 150)):
        (tmp_path / name).write_bytes(b"x" * size)
    cut = pieces.split_into_chunks(find_input_files([str(tmp_path)], None))
    spans = [[(s.source.path[-6:], s.start, s.end) for s in piece.stretches] for piece in cut]
    assert spans == [
        [("/a.txt", 0, None), ("/b.txt", 0, None)],
        [("/c.txt", 0, None)],
        [("/d.txt", 0, None)],
        [(".jsonl", 0, 100)],
        [(".jsonl", 100, 150)],
    ]
    assert [piece.number for piece in cut] == [0, 1, 2, 3, 4]
    assert str(cut[0]) == f"{tmp_path}/a.txt and 1 files after it"
    assert str(cut[3]) == f"{tmp_path}/e.jsonl, bytes 0 to 100"


@given(text=st.text(st.sampled_from("ab \n\u2581é👩")), block=st.integers(1, 7), broken=st.integers(0, 3))
@settings(max_examples=300)
def test_a_text_read_in_fragments_is_the_text(tmp_path_factory, text, block, broken):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    raw = text.encode() + b"\xf0\x9f\x91"[:broken]
    path.write_bytes(raw)
    odd = InputWarnings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_BLOCK", block)
        (piece,) = pieces.split_into_chunks(find_input_files([str(path)], None))
        fragments = list(read_fragments(piece.stretches[0], ("text",), odd))
    assert "".join(fragment.text for fragment in fragments) == raw.decode(errors="replace")
    assert [fragment.last for fragment in fragments] == [False] * (len(fragments) - 1) + [True]
    for fragment, after in itertools.pairwise(fragments):
        # Not a word, and not blanks, on both sides of a cut.
        assert fragment.text[-1] == "\n" or (fragment.text[-1] not in " \u2581" and after.text[0] == " ")
    assert odd.counts.get("invalid_utf8", 0) == (1 if broken else 0)


@given(
    text=st.text(st.sampled_from("ab \n\u2581é👩")), block=st.integers(1, 7), kind=st.sampled_from(["jsonl", "parquet"])
)
def test_a_long_text_of_a_line_or_row_is_fragmented_too(tmp_path_factory, text, block, kind):
    path = tmp_path_factory.mktemp("text") / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.table({"text": ["one", text, "two"]}), path)
    else:
        path.write_bytes(jsonl("one", text, "two"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_BLOCK", block)
        fragments = list(
            read_fragments(InputRange(0, find_input_files([str(path)], None)[0]), ("text",), InputWarnings())
        )
    assert [(one.text, one.line) for one in join_fragments(fragments)] == [("one", 1), (text, 2), ("two", 3)]
    fragments = [fragment for fragment in fragments if fragment.line == 2]
    for fragment, after in itertools.pairwise(fragments):
        assert fragment.text[-1] == "\n" or (fragment.text[-1] not in " \u2581" and after.text[0] == " ")
    if "\n" in text[:-1] and len(text) > block:
        assert len(fragments) > 1


def test_byte_order_marks_and_blank_lines_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl("one") + b"\n  \n" + jsonl("two"))
    odd = InputWarnings()
    assert documents(tmp_path, odd=odd) == [("a.txt", "hello"), ("b.jsonl:1", "one"), ("b.jsonl:4", "two")]
    assert odd.counts == {"byte_order_marks": 2}
    assert odd.lines == {1: 4}


def test_broken_bytes_are_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xff\xef\xbf\xbd")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}\n' + jsonl("fine"))
    odd = InputWarnings()
    assert texts(tmp_path, odd=odd) == ["caf\ufffd \ufffd\ufffd", "\ufffd", "fine"]
    assert odd.counts == {"invalid_utf8": 3}
    assert odd.first == {"invalid_utf8": InputLocation(0, 0)}


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
def test_a_broken_line_is_passed_over_counted_and_an_error_when_strict(tmp_path, line, kind, detail):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl("good") + line + b"\n" + jsonl("better"))
    odd = InputWarnings()
    assert texts(path, odd=odd) == ["good", "better"]
    assert (odd.counts, odd.first) == ({kind: 1}, {kind: InputLocation(0, 2)})
    with pytest.raises(InputError) as error:
        texts(path, odd=InputWarnings(strict=True))
    assert (error.value.kind, error.value.place) == (kind, InputLocation(0, 2))
    assert error.value.detail.startswith(detail)


def test_the_text_may_stand_within_other_keys(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": {"b": "deep"}}\n{"a": "b"}\n{"a": {"b": {}}}\n')
    odd = InputWarnings()
    assert texts(tmp_path / "a.jsonl", key="a.b", odd=odd) == ["deep"]
    assert odd.counts == {"no_text": 1, "not_a_string": 1}


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl("x"))
    (piece,) = pieces.split_into_chunks(find_input_files([str(path)], None))
    path.unlink()
    with pytest.raises(UserError) as error:
        list(read_fragments(piece.stretches[0], ("text",), InputWarnings()))
    assert str(error.value) == (
        f"megagpt: cannot read the file: No such file or directory\n  {path}\n"
        "  do: check that it is there and that you may read it"
    )


def test_lines_beyond_four_gigabytes_are_found(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:  # sparse: a line of 4 GB that nobody reads
        file.write(jsonl("first"))
        file.seek(2**32)
        file.write(b"\n" + jsonl("second", "third"))
    (source,) = find_input_files([str(path)], None)
    cut = pieces.split_into_chunks([source])
    stretches = [stretch for piece in cut for stretch in piece.stretches]
    assert [stretch.start for stretch in stretches[1:]] == [stretch.end for stretch in stretches[:-1]]
    assert (stretches[0].start, stretches[-1].end) == (0, source.size)
    assert stretches[-1].start <= 2**32 < stretches[-1].end
    beyond = pieces.InputRange(0, source, 2**32, source.size)
    assert [fragment.text for fragment in read_fragments(beyond, ("text",), InputWarnings())] == ["second", "third"]
