"""Corpora with more tokens or bytes than 32 bits can count, as sparse files."""

import numpy as np
import pytest

from megagpt.corpus.reader import HEADER, MAGIC, CorpusReader
from megagpt.data.evaluation_batches import EvaluationBatches
from megagpt.data.loader import Loader
from tests import own_process

SEQUENCE = 1 << 20


@pytest.fixture
def large(tmp_path):
    """Return a function that writes a sparse corpus with a few ids at given token offsets."""

    def make(width, tokens, ids_at):
        sequences = tokens // SEQUENCE
        code, kind = {1: (1, np.uint8), 2: (8, np.uint16), 4: (4, np.int32)}[width]
        with (tmp_path / "c.bin").open("wb") as file:
            file.truncate(width * tokens)
            for offset, ids in ids_at.items():
                file.seek(width * offset)
                file.write(np.array(ids, kind).tobytes())
        with (tmp_path / "c.idx").open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, sequences, sequences + 1))
            np.full(sequences, SEQUENCE, np.int32).tofile(file)
            (np.arange(sequences, dtype=np.int64) * width * SEQUENCE).tofile(file)
            np.arange(sequences + 1, dtype=np.int64).tofile(file)
        return tmp_path / "c"

    return make


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("edge", [2**31, 2**32], ids=["31 bits", "32 bits"])
@pytest.mark.parametrize("unit", ["bytes", "tokens"])
def test_tokens_beyond_32_bit_offsets_are_read_correctly(large, width, edge, unit):
    edge = edge // width if unit == "bytes" else edge
    ids = list(range(1, 17))
    prefix = large(width, edge + 2 * SEQUENCE, {edge - 8: ids})
    reader = CorpusReader(prefix)
    assert reader.tokens[edge - 8 : edge + 8].tolist() == ids
    assert np.frombuffer(reader.read_range(edge - 8, 16), reader.dtype).tolist() == ids
    assert reader.document(edge // SEQUENCE)[:8].tolist() == ids[8:]

    loader = Loader([(prefix, 1.0)], seq_len=SEQUENCE // 4, seed=3, vocab_size=100, micro_batch=1)
    n = loader.sampler.samples_per_epoch
    assert n == reader.tokens.size // (SEQUENCE // 4) - 1
    starts = loader.sampler.locate(range(n)).start
    assert np.array_equal(np.sort(starts), starts.min() + np.arange(n) * (SEQUENCE // 4))
    (hit,) = np.flatnonzero((starts <= edge - 8) & (edge + 8 <= starts + SEQUENCE // 4))
    (batch,) = loader.batches(int(hit))
    at = edge - 8 - int(starts[hit])
    assert batch.input_ids[0, at : at + 16].tolist() == ids
    assert int(batch.input_ids.sum()) == sum(ids)

    whole = EvaluationBatches(reader, seq_len=SEQUENCE, vocab_size=100, micro_batch=1)
    assert whole.tokens == edge + 2 * SEQUENCE - 1


def growth_of_a_loader(prefix):
    """Bytes by which the process grows while a loader reads a quarter of a GiB."""
    loader = Loader([(prefix, 1.0)], seq_len=16384, seed=1, vocab_size=100, micro_batch=8)
    loader.batches(0)
    before = own_process.resident_bytes()
    for update in range(1000):
        loader.batches(8 * update)
    return own_process.resident_bytes() - before


def growth_of_a_memory_map(prefix):
    """The same amount read through a memory map, whose pages count as memory of the process."""
    tokens = CorpusReader(prefix).tokens
    before = own_process.resident_bytes()
    int(tokens[: 1 << 27].max())
    return own_process.resident_bytes() - before


def test_memory_does_not_grow_with_the_tokens_read(large):
    prefix = large(2, 1 << 31, {})
    assert own_process.run(growth_of_a_memory_map, prefix) > 128 << 20
    assert own_process.run(growth_of_a_loader, prefix) < 32 << 20
