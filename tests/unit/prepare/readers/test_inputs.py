import bz2
import gzip
import json
import lzma
import os
import threading
import tracemalloc

import fsspec
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megagpt.errors import UserError
from megagpt.prepare import chunks
from megagpt.prepare.chunks import split_into_chunks
from megagpt.prepare.input_warnings import InputLocation, InputWarnings
from megagpt.prepare.readers import decompress
from megagpt.prepare.readers.file_type import SUPPORTED_SUFFIXES
from megagpt.prepare.readers.inputs import DEFAULT_CORPUS, find_input_files
from megagpt.prepare.readers.reader import read_fragments
from tests.unit.prepare.readers.whole import whole_documents

COMPRESSORS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
PLAIN = {
    "a.jsonl": ('{"text": "one"}\n' * 3 + '{"text": "two é"}\n', ["one"] * 3 + ["two é"]),
    "a.txt": ("first line\n" * 5000 + "and é\n", ["first line\n" * 5000 + "and é\n"]),
    "a.md": ("# title\n", ["# title\n"]),
}


def texts(*inputs, key="text", warnings=None):
    files = find_input_files([str(given) for given in inputs], None)
    return [document.text for document in whole_documents(files, tuple(key.split(".")), warnings or InputWarnings())]


def refused(*inputs):
    with pytest.raises(UserError) as error:
        texts(*inputs)
    return str(error.value).removeprefix("megagpt: ")


def test_files_and_folders_are_found_in_order(tmp_path):
    (tmp_path / "books" / "sub").mkdir(parents=True)
    (tmp_path / "books" / ".hidden").mkdir()
    for name in ("b.txt", "sub/a.md", "a.jsonl", "c.txt.gz", "picture.png", ".notes.txt", ".hidden/c.txt", "d.gz"):
        (tmp_path / "books" / name).write_text(name)
    (tmp_path / "Z.TXT").write_text("zed")
    found = find_input_files([str(tmp_path / "Z.TXT"), str(tmp_path / "books")], None)
    names = ["Z.TXT", "books/a.jsonl", "books/b.txt", "books/c.txt.gz", "books/sub/a.md"]
    assert [source.path for source in found] == [str(tmp_path / name) for name in names]
    assert [source.size for source in found] == [3, 7, 5, 8, 8]


@pytest.mark.parametrize("inputs", [[], [DEFAULT_CORPUS]])
def test_no_input_or_default_is_the_default_corpus(inputs):
    assert [source.path for source in find_input_files(inputs, None)] == [DEFAULT_CORPUS]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("ending", COMPRESSORS)
def test_all_members_of_compressed_files_are_read(tmp_path, name, ending):
    content, expected = PLAIN[name]
    raw, compress = content.encode(), COMPRESSORS[ending]
    for number, cuts in enumerate(([len(raw)], [0, 7, 40, len(raw)])):
        members = [raw[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]
        path = tmp_path / f"{number}{name}{ending}"
        path.write_bytes(b"".join(map(compress, members)))
        assert texts(path) == expected
        path.rename(tmp_path / f"{number}-{name}")  # without the suffix of the compression
        assert texts(tmp_path / f"{number}-{name}") == expected


@pytest.mark.parametrize("ending", COMPRESSORS)
@pytest.mark.parametrize("damage", ["truncated", "garbled"])
def test_a_damaged_compressed_file_is_an_error(tmp_path, ending, damage):
    path = tmp_path / f"a.jsonl{ending}"
    lines = "".join(json.dumps({"text": f"{n} {n * n}"}) + "\n" for n in range(30_000))
    raw = bytearray(COMPRESSORS[ending](lines.encode()))
    if damage == "garbled":
        raw[len(raw) // 2] ^= 0x55
    path.write_bytes(raw if damage == "garbled" else raw[: len(raw) * 3 // 4])
    what, where, do = refused(path).splitlines()
    assert what.startswith("the compressed file is damaged or truncated: ")
    assert (where, do) == (f"  {path}", "  do: copy or create it again")


def test_the_format_is_detected_from_the_content(tmp_path):
    lines = '\n{"text": "one"}\n{"text": "two"}\n'
    for name in ("lines.txt", "lines.data", "lines", "lines.json"):
        (tmp_path / name).write_text(lines)
        assert texts(tmp_path / name) == ["one", "two"]
    for name in ("README", "notes.log"):
        (tmp_path / name).write_text("{plain}\ntext é")
        assert texts(tmp_path / name) == ["{plain}\ntext é"]
    parquet.write_table(pyarrow.table({"text": ["row"]}), tmp_path / "table.txt")
    assert texts(tmp_path / "table.txt") == ["row"]
    for name, content in (("a.pdf", b"%PDF-1.7 text"), ("program", b"\x7fELF\0\0"), ("a.parquet", b"text")):
        (tmp_path / name).write_bytes(content)
        ending = name[1:] if "." in name else "no suffix"
        assert refused(tmp_path / name) == (
            f"this file is neither text nor parquet ({ending})\n  {tmp_path / name}\n"
            f"  do: use {SUPPORTED_SUFFIXES} files, or a text file with any name"
        )


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_other_encodings_and_single_json_values_are_refused_with_a_remedy(tmp_path, ending):
    values = json.dumps([{"text": "one"}, {"text": "two"}]), json.dumps({"text": "one"}, indent=1), '[\n{"text": "a"}]'
    for content in values:
        path = tmp_path / f"a.json{ending}"
        path.write_bytes(gzip.compress(content.encode()) if ending else content.encode())
        assert refused(path) == (
            f"this file is a single JSON value, not one per line\n  {path}\n"
            "  do: write one document per line: jq --compact-output '.[]' FILE (or '.' if it is not a list)"
        )
    for name, code in (("a.txt", "utf-16"), ("a.jsonl", "utf-16"), ("a", "utf-32")):
        path = tmp_path / f"{name}{ending}"
        raw = '{"text": "one é"}\n'.encode(code)
        path.write_bytes(gzip.compress(raw) if ending else raw)
        assert refused(path) == (
            f"this text is UTF-16 or UTF-32, not UTF-8\n  {path}\n"
            "  do: convert it: iconv --from-code UTF-16 --to-code UTF-8 FILE (or UTF-32)"
        )


def test_jsonl_is_detected_from_the_beginning_of_a_long_first_line(tmp_path):
    long = "word " * 20_000 + '\\"'
    for name in ("a.txt", "a", "a.parquet"):
        (tmp_path / name).write_text(f' {json.dumps({"text": long})}\n{{"text": "two"}}\n')
        assert texts(tmp_path / name) == [long, "two"]
    for begin in ("{word ", '{"word" ', '{"', "["):
        (tmp_path / "b.txt").write_text(begin + "word " * 20_000)
        assert texts(tmp_path / "b.txt") == [begin + "word " * 20_000]


def test_pipes_are_read_completely_and_twice(tmp_path):
    """As of <(command) in a shell; the bytes from which the format was detected are not lost."""
    lines = [f"line {number} words" for number in range(9000)]
    content = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()
    for name, raw in (("one", content), ("two", gzip.compress(content))):
        os.mkfifo(tmp_path / name)
        threading.Thread(target=(tmp_path / name).write_bytes, args=(raw,), daemon=True).start()
    (tmp_path / "spools").mkdir()
    files = find_input_files([str(tmp_path / name) for name in ("one", "two")], tmp_path / "spools" / "stdin")
    for _ in range(2):
        assert [one.text for one in whole_documents(files, ("text",), InputWarnings())] == lines * 2
    assert refused("/dev/null") == "this is not a file\n  /dev/null\n  do: use files, folders, patterns or pipes"


def test_patterns_find_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "c.md", "sub/d.txt", "odd[1].txt"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "?.txt") == ["a.txt", "b.txt"]
    assert texts(tmp_path / "**/*.txt") == ["a.txt", "b.txt", "odd[1].txt", "sub/d.txt"]
    assert texts(tmp_path / "odd[1].txt") == ["odd[1].txt"]
    assert refused(tmp_path / "*.jsonl") == (
        f"no file matches this pattern\n  {tmp_path}/*.jsonl\n"
        "  do: correct it, and quote it so that the shell does not expand it"
    )


def test_a_manifest_lists_files_and_names_corpora(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    manifest = tmp_path / "list"
    manifest.write_text(f"\ufeff# files\nb.txt\tbooks\n\n{tmp_path}/a.txt\nc.txt\tweb_2\n")
    found = find_input_files([f"@{manifest}"], None)
    assert [(source.path[-5:], source.corpus) for source in found] == [
        ("b.txt", "books"),
        ("a.txt", ""),
        ("c.txt", "web_2"),
    ]
    manifest.write_text("a.txt\nd.txt\n")
    assert refused(f"@{manifest}") == (
        f"there is no such file or folder\n  {tmp_path}/d.txt\n  {manifest}:2\n"
        "  do: correct the path, or use `default` for the default corpus"
    )
    manifest.write_text("a.txt\t../up\n")
    assert refused(f"@{manifest}") == (
        f"`../up` cannot be the name of a corpus\n  {manifest}:1\n"
        "  do: use letters, digits, - and _ in the name, after one tab; a weight comes after the name and another tab"
    )
    assert refused(f"@{tmp_path}/none") == (
        f"cannot read the manifest: [Errno 2] No such file or directory: '{tmp_path}/none'\n  {tmp_path}/none\n"
        "  do: write one path per line, in UTF-8"
    )


COLUMNS = "write PATH, or PATH <tab> NAME, or PATH <tab> NAME <tab> WEIGHT"
NUMBER = "write PATH <tab> NAME <tab> WEIGHT, with a weight above 0"
ALL = "give every corpus a name and a weight, or give none a weight"


@pytest.mark.parametrize(
    ("lines", "what", "places", "do"),
    [
        ("a.txt\tone\t2\tmore", "this line has 4 columns", ["{m}:1"], COLUMNS),
        ("\n\tone", "this line names no file", ["{m}:2"], COLUMNS),
        ("a.txt\t7", "`7` cannot be the name of a corpus", ["{m}:1"], "use letters, digits, - and _ in the name, "
            "after one tab; a weight comes after the name and another tab"),
        ("a.txt\tone\tmuch", "`much` is not a weight", ["{m}:1"], NUMBER),
        ("# a\na.txt\tone\t0", "`0` is not a weight", ["{m}:2"], NUMBER),
        ("a.txt\tone\tnan", "`nan` is not a weight", ["{m}:1"], NUMBER),
        ("a.txt\t\t3", "the weight 3 has no corpus name before it", ["{m}:1"], NUMBER),
        ("a.txt\tone\t3\n\nb.txt\tone\t2.5", "`one` has the weights 3 and 2.5", ["{m}:1", "{m}:3"],
            "a weight applies to the whole corpus: give it once, or the same one each time"),
        ("b.txt\ttwo\na.txt\tone\t3", "`two` has no weight", ["{m}:1", "{m}:2: a weight"], ALL),
        ("a.txt\tone\t3\nb.txt", "files without a named corpus have no weight", ["{m}:2", "{m}:1: a weight"], ALL),
    ],
)  # fmt: skip
def test_errors_in_a_manifest_are_reported_with_their_lines(tmp_path, lines, what, places, do):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    manifest = tmp_path / "list"
    manifest.write_text(lines + "\n")
    where = "".join(f"  {place.format(m=manifest)}\n" for place in places)
    assert refused(f"@{manifest}") == f"{what}\n{where}  do: {do}"


def test_weights_in_a_manifest_apply_to_corpora(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    manifest = tmp_path / "list"
    manifest.write_text("a.txt\tone\t3\r\nb.txt\tone\r\nc.txt \t two\t0.5\r\nb.txt\tone\t3.0\r\n")
    found = find_input_files([f"@{manifest}"], None)
    assert [(source.corpus, source.weight) for source in found] == [("one", 3), ("one", 3), ("two", 0.5), ("one", 3)]
    with pytest.raises(UserError) as error:
        find_input_files([f"@{manifest}", str(tmp_path / "a.txt")], None)
    assert error.value.problems[0].where == f"INPUT\n{manifest}:1: a weight"


def rows(tmp_path, column, kind=None, **options):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array(column, kind), "id": range(len(column))}), path, **options)
    return path


def test_a_column_of_a_parquet_file_is_read(tmp_path):
    warnings = InputWarnings()
    assert texts(rows(tmp_path, ["one", None, "", "é"]), warnings=warnings) == ["one", "", "é"]
    assert (warnings.counts, warnings.first) == ({"no_text": 1}, {"no_text": InputLocation(0, 2)})
    deep = [{"body": {"en": "deep", "n": 1}}, {"body": None}, None, {"body": {"en": "x", "n": 2}}]
    warnings = InputWarnings()
    assert texts(rows(tmp_path, deep), key="text.body.en", warnings=warnings) == ["deep", "x"]
    assert warnings.counts == {"no_text": 2}
    warnings = InputWarnings()
    assert texts(rows(tmp_path, [1, 2]), warnings=warnings) == []
    assert warnings.counts == {"not_a_string": 2}
    for key in ("absent", "text.deeper"):
        warnings = InputWarnings()
        assert texts(rows(tmp_path, ["a", "b"]), key=key, warnings=warnings) == []
        assert warnings.counts == {"no_text": 2}


def test_every_row_is_in_exactly_one_chunk(tmp_path, monkeypatch):
    column = [f"text {n}" for n in range(100)]
    path = rows(tmp_path, column, row_group_size=9)
    for size in (1, 700, 10**9):
        monkeypatch.setattr(chunks, "_MIN_BYTES", size)
        found = [
            (fragment.line, fragment.text)
            for chunk in split_into_chunks(find_input_files([str(path)], None))
            for part in chunk.ranges
            for fragment in read_fragments(part, ("text",), InputWarnings())
        ]
        assert found == list(enumerate(column, 1))


def test_the_error_names_a_damaged_parquet_file(tmp_path):
    path = rows(tmp_path, ["one"] * 1000)
    path.write_bytes(path.read_bytes()[:200])
    what, where, do = refused(path).splitlines()[0], *refused(path).splitlines()[-2:]
    assert what.startswith("cannot read the parquet file: ")
    assert (where, do) == (f"  {path}", "  do: copy or create it again")


def test_remote_files_are_read_by_their_address(tmp_path):
    store = fsspec.filesystem("memory")
    for name, content in (("b.txt", b"bee"), ("a.jsonl.gz", gzip.compress(b'{"text": "ay"}')), ("c.png", b"\0")):
        store.pipe(f"/bucket/{name}", content)
    parquet.write_table(pyarrow.table({"text": ["row"]}), tmp_path / "d.parquet")
    store.put(str(tmp_path / "d.parquet"), "/bucket/d.parquet")
    assert texts("memory://bucket/b.txt") == ["bee"]
    assert texts("memory://bucket") == ["ay", "bee", "row"]
    assert texts("memory://bucket/*.gz") == ["ay"]
    (tmp_path / "e.txt").write_text("here")
    assert texts(f"file://{tmp_path}/e.txt") == ["here"]
    for address in ("memory://bucket/none.txt", "memory://bucket/*.xz"):
        assert refused(address) == (
            f"no text file was found there\n  {address}\n"
            f"  do: correct the address; of a folder, {SUPPORTED_SUFFIXES} files are read"
        )
    assert refused("nowhere://a").startswith("cannot open this store: ")


@pytest.mark.parametrize(
    ("package", "extra", "name"),
    [("zstandard", "zst", "a.txt.zst"), ("pyarrow", "parquet", "a.parquet"), ("fsspec", "remote", "file:///a.txt")],
)
def test_the_error_names_a_missing_package(tmp_path, monkeypatch, package, extra, name):
    (tmp_path / "a.txt.zst").write_bytes(COMPRESSORS[".zst"](b"text"))
    parquet.write_table(pyarrow.table({"text": ["row"]}), tmp_path / "a.parquet")
    given = name if "//" in name else str(tmp_path / name)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    assert refused(given) == (
        f'reading this needs the package {package}\n  {given}\n  do: pip install "megagpt[{extra}]"'
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "there is no such file or folder\n  {path}\n"
            "  do: correct the path, or use `default` for the default corpus"),
        ("empty", "the folder contains no text files\n  {path}\n"
            "  do: put {known} files into it, or use another folder"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_exist_are_reported_before_anything_is_read(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(UserError) as error:
        find_input_files([str(tmp_path / "good.txt"), str(tmp_path / name)], None)
    assert str(error.value) == "megagpt: " + message.format(path=tmp_path / name, known=SUPPORTED_SUFFIXES)


def test_zstandard_blocks_that_expand_to_more_than_one_read_are_read_to_the_end(tmp_path, monkeypatch):
    text = "abc" * 1_000_000  # a small block of the file expands to far more than one read
    (tmp_path / "a.txt.zst").write_bytes(COMPRESSORS[".zst"](text.encode()) * 2)
    assert texts(tmp_path / "a.txt.zst") == [text * 2]
    assert decompress.detect_compression(b"BZh9") is decompress.Compression.BZIP2


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_highly_compressed_file_is_never_in_memory_as_a_whole(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(COMPRESSORS[ending](b"0123456789 words\n" * 5_000_000))  # 85 MB
    size = 0
    tracemalloc.start()
    try:
        with decompress.open_decompressed(str(path), decompress.detect_compression(path.read_bytes()[:9])) as file:
            while block := file.read(1 << 20):
                size += len(block)
        assert size == 85_000_000
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()
