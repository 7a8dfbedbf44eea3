"""The checksum of a tensor equals its closed form, however the tensor is split."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt.checkpoint import tensor_files
from megagpt.checkpoint.tensor_files import checksum


def closed_form(tensor, indices):
    """In Python's integers: the sum of (bits + a)·(index·b + 1), modulo 2^64."""
    bits = tensor.view(torch.int32).tolist()
    terms = ((bit + 0x5851F42D) * (index * 0x14057B7EF767814E + 1) for bit, index in zip(bits, indices, strict=True))
    return sum(terms) % (1 << 64)


@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=40),
    start=st.integers(0, 1 << 40),
    chunk=st.integers(1, 50),
    cut=st.integers(0, 40),
)
def test_checksums_of_slices_add_up_to_the_closed_form_of_the_whole(values, start, chunk, cut):
    tensor, indices = torch.tensor(values, dtype=torch.float32), range(start, start + len(values))
    kept, tensor_files._CHUNK = tensor_files._CHUNK, chunk
    try:
        expected = closed_form(tensor, indices)
        assert checksum(tensor, start) == expected
        assert checksum(tensor, torch.tensor(indices)) == expected
        cut = min(cut, len(values))
        assert (checksum(tensor[:cut], start) + checksum(tensor[cut:], start + cut)) % (1 << 64) == expected
    finally:
        tensor_files._CHUNK = kept


def test_a_change_of_one_bit_or_of_the_order_changes_the_checksum():
    tensor = torch.randn(300_000, generator=torch.Generator().manual_seed(1))
    expected = checksum(tensor, 7)
    for index in (0, 131_071, 131_072, 299_999):
        for bit in range(31):
            changed = tensor.clone()
            changed.view(torch.int32)[index] ^= 1 << bit
            assert checksum(changed, 7) != expected
    assert checksum(tensor.flip(0), 7) != expected
