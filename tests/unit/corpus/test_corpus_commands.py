import json
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from megagpt.cli import main
from megagpt.corpus import bin_writer
from megagpt.corpus import merge as merging
from megagpt.corpus import verify as verifying
from megagpt.corpus import writer as indexed_writer
from megagpt.corpus.inspect import inspect
from megagpt.corpus.merge import merge
from megagpt.corpus.reader import CorpusReader
from megagpt.corpus.verify import verify
from megagpt.corpus.writer import CorpusWriter
from megagpt.errors import UserError
from megagpt.tokenizer.tokenizer import Tokenizer, train_tokenizer

EOD = 1
DOCUMENTS = [[7, 8, 9, EOD], [], [5, EOD], [6, 6, 6, 6, 6, EOD]]


@pytest.fixture(scope="session")
def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def write(prefix, documents=DOCUMENTS, vocab_size=50, sha="f" * 64):
    with CorpusWriter(prefix, vocab_size) as writer:
        for ids in documents:
            writer.add_document(ids, 3 * len(ids))
        writer.finish(sha, EOD, {"by": "a test"})
    return str(prefix)


def content(prefix):
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def rejection(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    return str(error.value).removeprefix("megagpt: ")


def test_inspect_shows_statistics_and_documents(tmp_path):
    found = inspect(write(tmp_path / "c"), [2], sample=2)
    assert (found.documents, found.sequences, found.tokens, found.id_type) == (4, 3, 12, "uint16")
    assert dict(found.lengths) == {"min": 0, "25 %": 0, "median": 2, "75 %": 4, "max": 6}
    assert [(one.number, one.tokens, one.ids) for one in found.shown] == [
        (2, 2, (5, EOD)), (0, 4, (7, 8, 9, EOD)), (3, 6, (6,) * 5 + (EOD,))
    ]  # fmt: skip
    assert str(found).splitlines() == [
        f"{tmp_path}/c: 4 documents, 3 sequences, 12 tokens (uint16), tokenizer ffffffffffff",
        "tokens per document: min 0, 25 % 0, median 2, 75 % 4, max 6",
        "by: a test",
        "document 2: 2 tokens",
        "5 1",
        "document 0: 4 tokens",
        "7 8 9 1",
        "document 3: 6 tokens",
        "6 6 6 6 6 1",
    ]
    what = rejection(inspect, str(tmp_path / "c"), [4])
    assert what == f"there is no document 4\n  {tmp_path}/c\n  do: give a number from 0 to 3"
    assert dict(inspect(write(tmp_path / "e", [[]]), sample=3).lengths) == {}


def test_inspect_with_a_tokenizer_shows_text(tmp_path, capsys):
    model = Tokenizer(train_tokenizer(["one two three four"] * 5, 290, tmp_path / "t"))
    text = "one two\nthree"
    prefix = write(tmp_path / "c", [[*model.encode(text), model.eod]], model.vocab_size, model.sha256)
    assert main(["data", "inspect", prefix, "--document", "0", "--tokenizer", str(model.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shown"][0]["text"] == text
    other = train_tokenizer(["five six seven"] * 5, 280, tmp_path / "other")
    assert rejection(inspect, prefix, [], 0, other) == (
        f"different tokenizers were used\n  {model.sha256[:12]}…  {prefix}\n"
        f"  {Tokenizer(other).sha256[:12]}…  {other}\n"
        "  do: use the tokenizer that the corpus was prepared with, or prepare the corpus again"
    )


def test_verify_reports_an_undamaged_corpus(tmp_path, capsys, monkeypatch):
    prefix = write(tmp_path / "c")
    assert main(["data", "verify", prefix]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{prefix}: 4 documents, 12 tokens",
        "checked: index, ids 0 to 9, checksums, vocabulary of 50, ends of documents",
        "no damage found",
    ]
    (tmp_path / "c.json").unlink()
    for module, name, size in ((verifying, "_RANGE", 8), (verifying, "_BLOCK", 4), (verifying, "_ENTRIES", 2)):
        monkeypatch.setattr(module, name, size)
    verification = verify(prefix, 3)
    assert (verification.checked, verification.wrong) == (("index", "ids 0 to 9"), ())
    assert verify(write(tmp_path / "none", [[], []])).wrong == ()


def overwrite(path, at, value):
    raw = bytearray(path.read_bytes())
    raw[at : at + len(value)] = value
    path.write_bytes(raw)


IDX = 34  # where the arrays of .idx start: three int32 lengths, three int64 offsets, five int64 documents
DAMAGE = [
    (".bin", 2 * 5, struct.pack("<H", 60), "there is an id outside the vocabulary of 50: 60"),
    (".bin", 2 * 2, struct.pack("<H", 3), "c.bin does not match its checksum: bytes 0 to 8"),
    (".bin", 2 * 9, struct.pack("<H", 3), "c.bin does not match its checksum: bytes 16 to 24"),
    (".bin", 2 * 3, struct.pack("<H", 3), "document 0 does not end with the end-of-document token (1)"),
    (".bin", 2 * 11, struct.pack("<H", 3), "document 3 does not end with the end-of-document token (1)"),
    (".idx", IDX, struct.pack("<i", -4), "sequence 0 has a negative length"),
    (".idx", IDX + 4, struct.pack("<i", 3), "sequence 2 does not start where the one before ends"),
    (".idx", IDX + 12 + 8, struct.pack("<q", 6), "sequence 1 does not start where the one before ends"),
    (".idx", IDX + 36, struct.pack("<q", 1), "the first document does not start with the first sequence"),
    (".idx", IDX + 36 + 8, struct.pack("<q", 2), "document 1 ends before it starts"),
    (".idx", IDX + 36 + 8, struct.pack("<q", 0), "c.idx does not match its checksum"),
]


@pytest.mark.parametrize(("suffix", "at", "value", "message"), DAMAGE)
@pytest.mark.parametrize("entries", [2, 1000])
def test_all_kinds_of_damage_are_reported(tmp_path, monkeypatch, suffix, at, value, message, entries):
    monkeypatch.setattr(bin_writer, "_RANGE", 8)
    monkeypatch.setattr(verifying, "_ENTRIES", entries)
    prefix = write(tmp_path / "c")
    overwrite(tmp_path / f"c{suffix}", at, value)
    wrong = verify(prefix).wrong
    assert any(one.removeprefix(f"{tmp_path}/") == message for one in wrong), wrong
    assert main(["data", "verify", prefix]) == 1


def test_a_negative_id_is_reported(tmp_path, megatron):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.int32)
    builder.add_item(torch.tensor([5, -3]))
    builder.end_document()
    builder.finalize(str(tmp_path / "c.idx"))
    assert verify(str(tmp_path / "c")).wrong == ("there is a negative id: -3",)


def merged_by_megatron(megatron, prefixes, output, kind):
    builder = megatron.IndexedDatasetBuilder(f"{output}.bin", dtype=kind)
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(f"{output}.idx")


@pytest.mark.parametrize("block", [2, 1 << 20])
def test_merged_files_equal_those_of_megatron(tmp_path, monkeypatch, megatron, block):
    monkeypatch.setattr(merging, "_TOKENS", block)
    monkeypatch.setattr(merging, "_ENTRIES", block)
    monkeypatch.setattr(indexed_writer, "MAX_SEQUENCE", 4)  # a document of several sequences
    prefixes = [
        write(tmp_path / "a"),
        write(tmp_path / "b", [[2, EOD], [3] * 9 + [EOD], []]),
        write(tmp_path / "e", [[]]),
    ]
    result = merge(prefixes, str(tmp_path / "ours"))
    merged_by_megatron(megatron, prefixes, tmp_path / "theirs", np.uint16)
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")
    assert (result.documents, result.tokens, result.verified) == (8, 24, True)
    assert CorpusReader(tmp_path / "ours").sidecar.text_bytes == 72
    assert verify(str(tmp_path / "ours")).wrong == ()


def test_foreign_corpora_are_merged_without_a_sidecar(tmp_path, megatron, capsys):
    for name in ("a", "b"):
        builder = megatron.IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.int32)
        builder.add_document([100_000, 7, 3, 2], [2, 2])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    prefixes = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["data", "merge", *prefixes, "--output", str(tmp_path / "ours")]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "written without a sidecar, since not all inputs have one"
    merged_by_megatron(megatron, prefixes, tmp_path / "theirs", np.int32)
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")
    assert not (tmp_path / "ours.json").exists()


def test_incompatible_corpora_are_rejected(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", sha="e" * 64)
    wide = write(tmp_path / "wide", vocab_size=70_000)
    output = str(tmp_path / "c")
    assert rejection(merge, [a, b], output) == (
        f"different tokenizers were used\n  ffffffffffff…  {a}\n  eeeeeeeeeeee…  {b}\n"
        "  do: use the tokenizer that the corpus was prepared with, or prepare the corpus again"
    )
    assert rejection(merge, [a, wide], output) == (
        f"the ids have different types (uint16 and int32)\n  {a}\n  {wide}\n  do: prepare both with one tokenizer"
    )
    assert rejection(merge, [a, b], a) == (
        f"a corpus cannot be merged into itself\n  {a}\n  do: choose another --output"
    )
    (tmp_path / "link").symlink_to(tmp_path)
    assert "into itself" in rejection(merge, [a, b], str(tmp_path / "link" / "a"))
    assert not list(tmp_path.glob("c.*"))


def write_packed(prefix, samples, seq_len=3, padding=1):
    with CorpusWriter(prefix, 50) as writer:
        for ids in samples:
            writer.add_document(ids, 3 * len(ids))
        writer.finish("f" * 64, EOD, {"by": "a test"}, seq_len, padding)
    return str(prefix)


PACKED = [[7, 8, 9, 10], [11, EOD, 5, EOD], [6, 6, EOD, EOD]]


def test_packed_corpora_are_inspected_and_verified_as_samples(tmp_path, capsys):
    prefix = write_packed(tmp_path / "c", PACKED)
    assert str(inspect(prefix, [1])).splitlines() == [
        f"{prefix}: 3 samples, packed for seq_len 3, 12 tokens (uint16), tokenizer ffffffffffff",
        "padding: 8.33%",
        "by: a test",
        "sample 1: 4 tokens",
        "11 1 5 1",
    ]
    assert main(["data", "verify", prefix]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{prefix}: 3 samples, 12 tokens",
        "checked: index, ids 0 to 11, checksums, vocabulary of 50, samples of 4 tokens",
        "no damage found",
    ]


@pytest.mark.parametrize("entries", [2, 5, 1000])
@pytest.mark.parametrize(
    ("samples", "padding", "message"),
    [
        ([[7, 8, 9], [5, EOD, EOD, 5, EOD]], 1, "sample 0 does not have 4 tokens"),
        ([*PACKED, [5, EOD, 6, 7]], 1, "sample 3 holds the end of a document, but its last document has no end"),
        (PACKED, 2, "at most 1 tokens are padding, but the sidecar records 2"),
    ],
)
def test_invalid_packed_samples_are_reported(tmp_path, monkeypatch, entries, samples, padding, message):
    monkeypatch.setattr(verifying, "_ENTRIES", entries)
    assert verify(write_packed(tmp_path / "c", samples, padding=padding)).wrong == (message,)


def test_packed_corpora_of_equal_seq_len_are_merged(tmp_path, megatron):
    prefixes = [write_packed(tmp_path / "a", PACKED), write_packed(tmp_path / "b", PACKED[1:])]
    assert str(merge(prefixes, str(tmp_path / "ours"))) == f"{tmp_path}/ours: 5 samples, 20 tokens"
    merged_by_megatron(megatron, prefixes, tmp_path / "theirs", np.uint16)
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")
    sidecar = CorpusReader(tmp_path / "ours").sidecar
    assert (sidecar.packed, sidecar.padding, sidecar.documents) == (3, 2, 5)
    assert verify(str(tmp_path / "ours")).wrong == ()


def test_packed_corpora_are_not_merged_with_different_ones(tmp_path):
    packed, plain = write_packed(tmp_path / "a", PACKED), write(tmp_path / "b")
    longer = write_packed(tmp_path / "longer", [[5] * 7 + [EOD]], 7, 0)
    both = "do: prepare both in the same way, or list both under data.train"
    assert rejection(merge, [packed, plain], str(tmp_path / "c")) == (
        f"one corpus is packed for seq_len 3, the other not packed\n  {packed}\n  {plain}\n  {both}"
    )
    assert rejection(merge, [packed, longer], str(tmp_path / "c")) == (
        f"one corpus is packed for seq_len 3, the other packed for seq_len 7\n  {packed}\n  {longer}\n  {both}"
    )
    (tmp_path / "b.json").unlink()
    assert "packed for seq_len 3, the other not packed" in rejection(merge, [packed, plain], str(tmp_path / "c"))
    assert not list(tmp_path.glob("c.*"))
