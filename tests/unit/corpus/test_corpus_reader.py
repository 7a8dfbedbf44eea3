import gc
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus import bin_writer, idx_writer
from megagpt.corpus import writer as indexed_writer
from megagpt.corpus.reader import CorpusReader
from megagpt.corpus.writer import CorpusWriter
from megagpt.errors import UserError
from megagpt.tokenizer.id_dtype import token_dtype

DOCUMENTS = st.lists(st.lists(st.integers(0, 40_000), max_size=20), max_size=12)


def write(prefix, documents, vocab_size=50_000):
    with CorpusWriter(prefix, vocab_size) as writer:
        for ids in documents:
            writer.add_document(ids, 2 * len(ids))
        return writer.finish("f" * 64, 1)


def content(prefix):
    return [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in (".bin", ".idx")]


def write_with_megatron(megatron, prefix, documents, kind):
    """Write as Megatron-LM's preprocess_data does: one sequence per document, none for an empty one."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=kind)
    for ids in documents:
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")


@given(documents=DOCUMENTS, vocab_size=st.sampled_from([40_001, 65_499, 65_500, 100_000]))
@settings(max_examples=40)
def test_files_equal_those_of_megatron(megatron, tmp_path_factory, documents, vocab_size):
    folder = tmp_path_factory.mktemp("both")
    write(folder / "ours", documents, vocab_size)
    kind = np.uint16 if vocab_size < 65_500 else np.int32
    write_with_megatron(megatron, folder / "theirs", documents, kind)
    assert content(folder / "ours") == content(folder / "theirs")


@given(documents=DOCUMENTS.filter(any))
@settings(max_examples=30)
def test_megatron_reads_our_files(megatron, tmp_path_factory, documents):
    prefix = tmp_path_factory.mktemp("ours") / "c"
    write(prefix, documents)
    theirs = megatron.IndexedDataset(str(prefix))
    assert [theirs[i].tolist() for i in range(len(theirs))] == [ids for ids in documents if ids]
    assert theirs.document_indices.tolist() == [0, *np.cumsum([bool(ids) for ids in documents]).tolist()]


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_we_read_files_of_megatron(megatron, tmp_path, kind):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=kind)
    for ids in ([1, 2, 3], [], [100], [4, 5]):  # [] becomes an empty sequence
        builder.add_item(torch.tensor(ids, dtype=torch.int64))
        if ids != [1, 2, 3]:
            builder.end_document()
    builder.finalize(str(tmp_path / "c.idx"))
    reader = CorpusReader(tmp_path / "c")
    assert reader.dtype == kind
    assert [reader.sequence(i).tolist() for i in range(len(reader))] == [[1, 2, 3], [], [100], [4, 5]]
    assert [reader.document(i).tolist() for i in range(3)] == [[1, 2, 3], [100], [4, 5]]
    assert reader.tokens.tolist() == [1, 2, 3, 100, 4, 5]
    assert reader.sidecar is None


def test_file_layout_is_as_documented(tmp_path):
    write(tmp_path / "c", [[7, 8], [], [9]])
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ2i2q4q", 1, 8, 2, 4, 2, 1, 0, 4, 0, 1, 1, 2)
    assert content(tmp_path / "c") == [struct.pack("<3H", 7, 8, 9), expected]


def test_sidecar_holds_the_documented_keys(tmp_path):
    sidecar = write(tmp_path / "c", [[7, 8], [], [9]])
    binary, index = content(tmp_path / "c")
    assert json.loads((tmp_path / "c.json").read_text()) == {
        "tokenizer_sha256": "f" * 64,
        "vocab_size": 50_000,
        "eod": 1,
        "documents": 3,
        "tokens": 3,
        "text_bytes": 6,
        "bin_crc32": zlib.crc32(binary),
        "idx_crc32": zlib.crc32(index),
        "version": 1,
        "bin_ranges": [[6, zlib.crc32(binary)]],
        "made": {},
        "packed": None,
        "padding": 0,
    }
    assert CorpusReader(tmp_path / "c").sidecar == sidecar


@given(sizes=st.lists(st.integers(0, 30), max_size=8), range_bytes=st.integers(1, 40))
def test_range_checksums_cover_all_ids_and_do_not_depend_on_write_sizes(tmp_path_factory, sizes, range_bytes):
    prefix = tmp_path_factory.mktemp("c") / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bin_writer, "_RANGE", range_bytes)
        sidecar = write(prefix, [range(size) for size in sizes])
    binary, _ = content(prefix)
    cut = [binary[start : start + range_bytes] for start in range(0, len(binary), range_bytes)]
    assert sidecar.bin_ranges == tuple((len(part), zlib.crc32(part)) for part in cut)
    assert sidecar.bin_crc32 == zlib.crc32(binary)


def test_sidecars_of_earlier_versions_are_read(tmp_path):
    sidecar = write(tmp_path / "c", [[1, 2]])
    path = tmp_path / "c.json"
    content = json.loads(path.read_text())
    ranges = content.pop("bin_ranges")
    path.write_text(json.dumps({**content, "stretches": ranges}))
    assert CorpusReader(tmp_path / "c").sidecar == sidecar
    del content["made"]
    path.write_text(json.dumps(content))
    assert CorpusReader(tmp_path / "c").sidecar.bin_ranges == ()


def test_ids_are_uint16_below_a_vocabulary_of_65500():
    assert [token_dtype(size).str for size in (2, 65_499, 65_500, 65_536)] == ["<u2", "<u2", "<i4", "<i4"]


def test_index_does_not_depend_on_the_block_size(tmp_path, megatron, monkeypatch):
    documents = [[n] * (n % 7) for n in range(100)]
    monkeypatch.setattr(idx_writer, "_BLOCK", 8)
    write(tmp_path / "ours", documents)
    write_with_megatron(megatron, tmp_path / "theirs", documents, np.uint16)
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")


@given(
    parts=st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=9), st.booleans()), max_size=6),
    block=st.integers(1, 5),
)
def test_documents_ended_in_bulk_give_the_same_index_as_one_by_one(tmp_path_factory, parts, block):
    """This includes sequences that are added before their documents, as when corpora are merged."""
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idx_writer, "_BLOCK", block)
        with CorpusWriter(folder / "together", 100) as writer:
            for lengths, apart in parts:
                if apart:
                    some = [length for length in lengths if length]
                    writer.end_sequences(np.array(some, np.int64), np.array([], np.int64), 0)
                    ends = np.cumsum([length > 0 for length in lengths], dtype=np.int64)
                    writer.end_sequences(np.array([], np.int64), ends - len(some), 0)
                else:
                    writer.end_documents(np.array(lengths, np.int64), 0)
            writer.finish_without_sidecar()
    with CorpusWriter(folder / "alone", 100) as writer:
        for lengths, _ in parts:
            for length in lengths:
                writer.end_documents(np.array([length]), 0)
        writer.finish_without_sidecar()
    assert content(folder / "together") == content(folder / "alone")


def test_a_document_too_long_for_one_sequence_is_split(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_writer, "MAX_SEQUENCE", 4)
    write(tmp_path / "c", [range(10), range(4), []])
    reader = CorpusReader(tmp_path / "c")
    assert reader.lengths.tolist() == [4, 4, 2, 4]
    assert reader.documents.tolist() == [0, 3, 4, 4]
    assert [reader.document(i).tolist() for i in range(3)] == [list(range(10)), list(range(4)), []]


@pytest.mark.parametrize("documents", [[], [[], []]], ids=["no documents", "empty documents"])
def test_a_corpus_without_tokens_can_be_written_and_opened(tmp_path, documents):
    write(tmp_path / "c", documents)
    reader = CorpusReader(tmp_path / "c")
    assert (len(reader), len(reader.tokens), len(reader.documents)) == (0, 0, len(documents) + 1)
    assert all(reader.document(i).tolist() == [] for i in range(len(documents)))


def test_arrays_outlive_the_reader(tmp_path):
    write(tmp_path / "c", [list(range(10_000))] * 50)
    reader = CorpusReader(tmp_path / "c")
    tokens, lengths = reader.sequence(3), reader.lengths
    del reader
    gc.collect()
    assert tokens.tolist() == list(range(10_000))
    assert lengths.tolist() == [10_000] * 50


def test_the_memory_map_is_read_only(tmp_path):
    write(tmp_path / "c", [[1, 2]])
    with pytest.raises(ValueError, match="read-only"):
        CorpusReader(tmp_path / "c").tokens[0] = 5


@pytest.mark.parametrize("ids", [[50_000], [1, -1], np.array([70_000]), np.array([-1], np.int8)])
def test_ids_outside_the_vocabulary_are_rejected(tmp_path, ids):
    with CorpusWriter(tmp_path / "c", 50_000) as writer:
        writer.add_document([5], 1)
        with pytest.raises(UserError) as error:
            writer.add_document(ids, 1)
    assert str(error.value) == (
        f"megagpt: token ids {min(ids)} to {max(ids)} do not fit the vocabulary of 50000\n"
        f"  {tmp_path / 'c'}, document 1\n  do: give the vocabulary size of the tokenizer that made the ids"
    )


def test_an_unfinished_corpus_leaves_no_files(tmp_path):
    def interrupted():
        with CorpusWriter(tmp_path / "c", 100) as writer:
            writer.add_document([5], 1)
            assert (tmp_path / "c.bin.partial").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails_at", [".bin", ".json", ".idx"])
def test_a_failed_rename_never_mixes_files_of_two_corpora(tmp_path, monkeypatch, fails_at):
    write(tmp_path / "c", [[1, 2, 3]])
    replace = type(tmp_path).replace

    def fail(path, target):
        if target.suffix == fails_at:
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "c", [[4, 5, 6]])
    assert not (tmp_path / "c.idx").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_new_corpus_replaces_an_older_one(tmp_path):
    write(tmp_path / "c", [[1, 2, 3]])
    write(tmp_path / "c", [[4, 5]])
    assert CorpusReader(tmp_path / "c").tokens.tolist() == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx", "c.json"]


def test_an_unwritable_output_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        CorpusWriter(tmp_path / "file" / "c", 100)
    assert str(error.value) == (
        f"megagpt: cannot write the corpus: File exists\n  {tmp_path / 'file'}\n"
        "  do: choose an output prefix in a folder that you may write to"
    )
    (tmp_path / "c.bin.partial").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        CorpusWriter(tmp_path / "c", 100)


def test_offsets_beyond_4_gib_are_correct(tmp_path, megatron):
    """Use a sparse .bin with documents beyond 2³¹ tokens and 2³² bytes, with markers at their first and last token."""
    lengths = [2**31 + 5, 3, 2**31 - 1, 2]
    with CorpusWriter(tmp_path / "c", 50_000) as writer:
        writer.end_documents(np.array(lengths), 0)
        writer.finish_without_sidecar()
    starts = np.cumsum([0, *lengths])
    with (tmp_path / "c.bin").open("r+b") as file:
        file.truncate(2 * int(starts[-1]))
        for number, start in enumerate(starts[:-1].tolist(), 1):
            file.seek(2 * start)
            file.write(struct.pack("<H", number))
            file.seek(2 * (start + lengths[number - 1] - 1))
            file.write(struct.pack("<H", 10 * number))
    reader, theirs = CorpusReader(tmp_path / "c"), megatron.IndexedDataset(str(tmp_path / "c"))
    assert [len(reader.document(n)) for n in range(4)] == lengths
    assert [(int(reader.document(n)[0]), int(reader.document(n)[-1])) for n in range(4)] == [
        (number, 10 * number) for number in (1, 2, 3, 4)
    ]
    assert reader.lengths.tolist() == [2**31 - 1, 6, 3, 2**31 - 1, 2]
    assert theirs.document_indices.tolist() == reader.documents.tolist()
    assert [theirs.get(2)[0], theirs.get(4)[0]] == [2, 4]
