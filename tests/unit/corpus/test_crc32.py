import zlib

from hypothesis import given
from hypothesis import strategies as st

from megagpt.corpus.crc32 import combine_crc32


@given(st.lists(st.binary(max_size=300)), st.integers(0, 5))
def test_combined_checksums_equal_that_of_the_whole(parts, zeros):
    parts.append(bytes(zeros) * 1000)
    checksum = 0
    for part in parts:
        checksum = combine_crc32(checksum, zlib.crc32(part), len(part))
    assert checksum == zlib.crc32(b"".join(parts))


def test_a_part_may_be_larger_than_memory():
    # Appending zeros in two steps equals appending them in one.
    zeros = zlib.crc32(bytes(1 << 20))
    step = combine_crc32(zlib.crc32(b"head"), zeros, 1 << 20)
    assert combine_crc32(combine_crc32(step, 0, 1 << 45), 0, 1 << 45) == combine_crc32(step, 0, 1 << 46)
