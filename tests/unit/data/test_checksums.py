import zlib

from hypothesis import given
from hypothesis import strategies as st

from megagpt.data.checksums import joined


@given(st.lists(st.binary(max_size=300)), st.integers(0, 5))
def test_checksums_of_parts_give_that_of_the_whole(parts, zeros):
    parts.append(bytes(zeros) * 1000)
    checksum = 0
    for part in parts:
        checksum = joined(checksum, zlib.crc32(part), len(part))
    assert checksum == zlib.crc32(b"".join(parts))


def test_a_part_may_be_larger_than_any_file():
    # Appending zeros in two steps or in one is the same.
    zeros = zlib.crc32(bytes(1 << 20))
    step = joined(zlib.crc32(b"head"), zeros, 1 << 20)
    assert joined(joined(step, 0, 1 << 45), 0, 1 << 45) == joined(step, 0, 1 << 46)
