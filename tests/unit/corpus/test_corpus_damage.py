"""Error messages for damaged and foreign corpora."""

import json
import struct

import pytest

from megagpt.corpus.reader import CorpusReader
from megagpt.corpus.writer import CorpusWriter
from megagpt.errors import UserError

RECREATE = "create the corpus with `megagpt prepare`, or copy it again"
VERIFY = "prepare the corpus again, or remove the sidecar to use the corpus unverified"
SIDECAR = "run `megagpt prepare` again, or remove c.json to use the corpus unverified"


@pytest.fixture
def corpus(tmp_path):
    with CorpusWriter(tmp_path / "c", 1000) as writer:
        for ids in ([1, 2, 3], [4, 5]):
            writer.add_document(ids, 9)
        writer.finish("0" * 64, 0)
    return tmp_path / "c"


def message(corpus):
    with pytest.raises(UserError) as error:
        CorpusReader(corpus)
    return str(error.value)


def expect(what, path, do):
    return f"megagpt: {what}\n  {path}\n  do: {do}"


def overwrite(path, offset, raw):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(raw)] = raw
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("offset", "raw", "what"),
    [
        (0, b"PK\3\4", "not an index in Megatron's format"),
        (0, b"TNTIDX\0\0", "fairseq's older index format (TNTIDX) is not supported"),
        (9, struct.pack("<Q", 2), "index version 2 is not supported, only version 1"),
        (17, b"\6", "the corpus holds floating-point numbers, not token ids"),
        (17, b"\7", "the corpus holds floating-point numbers, not token ids"),
        (17, b"\x09", "the corpus holds an unknown type (code 9)"),
        (18, struct.pack("<Q", 3), "the index has 82 bytes, but its header implies 94"),
        (74, struct.pack("<q", 1), "the last document of the index does not end with its last sequence"),
    ],
)
def test_the_damage_of_an_index_is_reported(corpus, offset, raw, what):
    overwrite(corpus.with_name("c.idx"), offset, raw)
    assert message(corpus) == expect(what, f"{corpus}.idx", RECREATE)


@pytest.mark.parametrize(
    ("size", "what"),
    [
        (0, "not an index in Megatron's format"),
        (33, "not an index in Megatron's format"),
        (81, "the index has 81 bytes, but its header implies 82"),
        (83, "the index has 83 bytes, but its header implies 82"),
        (84, "this is a multimodal corpus (the index has a mode per sequence), not text"),
    ],
)
def test_an_index_of_the_wrong_length_is_rejected(corpus, size, what):
    path = corpus.with_name("c.idx")
    path.write_bytes((path.read_bytes() + bytes(10))[:size])
    assert message(corpus) == expect(what, path, RECREATE)


@pytest.mark.parametrize("size", [0, 1, 8, 9, 11, 12])
def test_a_bin_file_of_the_wrong_length_is_reported(corpus, size):
    path = corpus.with_name("c.bin")
    path.write_bytes(bytes(size))
    assert message(corpus) == expect(
        f"the index describes 10 bytes of tokens, but the file has {size}",
        path,
        "copy or prepare the corpus again: the file was truncated or changed",
    )


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_reported(corpus, suffix):
    path = corpus.with_name("c" + suffix)
    path.unlink()
    assert message(corpus) == expect(
        "cannot open the corpus: No such file or directory",
        path,
        "give the prefix of a prepared corpus (its path without .bin or .idx); create one with `megagpt prepare`",
    )


def test_the_sidecar_of_another_corpus_is_rejected(corpus):
    path = corpus.with_name("c.json")
    path.write_text(path.read_text().replace('"tokens": 5', '"tokens": 6'))
    what = "the sidecar describes 6 tokens in 2 documents, but the corpus has 5 in 2"
    assert message(corpus) == expect(what, path, VERIFY)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"version": 2}, "the sidecar has version 2, but only version 1 is supported"),
        ({"tokens": "5", "eod": None}, "the sidecar has missing or invalid keys: eod, tokens"),
    ],
)
def test_an_invalid_sidecar_is_reported(corpus, change, what):
    path = corpus.with_name("c.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert message(corpus) == expect(what, path, SIDECAR)


def test_a_sidecar_that_is_not_json_is_reported(corpus):
    path = corpus.with_name("c.json")
    path.write_text("{")
    assert message(corpus).startswith("megagpt: cannot read the sidecar of the corpus: ")
    assert message(corpus).endswith(f"\n  {path}\n  do: {SIDECAR}")
    path.write_text("[]")
    assert message(corpus) == expect("the sidecar has version None, but only version 1 is supported", path, SIDECAR)
