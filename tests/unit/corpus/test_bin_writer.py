"""Several writers of one .bin give the bytes and checksums of a single writer."""

import itertools
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.corpus import bin_writer
from megagpt.corpus.bin_writer import BinWriter, merge_ranges


@given(content=st.binary(max_size=120), cuts=st.lists(st.integers(0, 120), max_size=4), range_bytes=st.integers(1, 50))
def test_ranges_of_several_writers_merge(tmp_path_factory, content, cuts, range_bytes):
    path = tmp_path_factory.mktemp("c") / "c.bin"
    bounds = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bin_writer, "_RANGE", range_bytes)
        path.touch()
        for start, end in itertools.pairwise(bounds):
            with BinWriter(path, start) as file:
                file.write(content[start : (start + end) // 2])
                file.write(content[(start + end) // 2 : end])
                parts += file.finish()
        whole = merge_ranges(parts)
    assert path.read_bytes() == content
    cut = [content[at : at + range_bytes] for at in range(0, len(content), range_bytes)]
    assert whole == [(len(part), zlib.crc32(part)) for part in cut]


@pytest.mark.parametrize("start", [2**31 - 6, 2**32 - 6, 2**40])
def test_a_writer_may_start_beyond_32_bit_offsets(tmp_path, start):
    (tmp_path / "c.bin").touch()
    with BinWriter(tmp_path / "c.bin", start) as file:
        file.write(b"twelve bytes")
        parts = file.finish()
    assert (tmp_path / "c.bin").stat().st_size == start + 12  # sparse
    with (tmp_path / "c.bin").open("rb") as file:
        file.seek(start)
        assert file.read() == b"twelve bytes"
    sizes = [6, 6] if start < 2**40 else [12]  # a range ends there
    assert [size for size, _ in parts] == sizes
    assert parts[-1][1] == zlib.crc32(b"twelve bytes"[-sizes[-1] :])
