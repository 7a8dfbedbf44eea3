"""A sample is what its rule says, whoever draws what part of it."""

import hashlib
import struct

from hypothesis import given
from hypothesis import strategies as st

from megagpt.data.sample import BoundedSample

TEXTS = st.lists(st.text("aé中", max_size=9), max_size=40)


def by_the_rule(texts, limit):
    """The texts of the smallest hashes up to the first that does not fit, in their order."""
    drawn = sorted(
        (hashlib.blake2b(struct.pack("<qq", 3, n), digest_size=8).digest()[::-1], n) for n in range(len(texts))
    )
    kept, size = [], 0
    for _, number in drawn:
        size += len(texts[number].encode())
        if size > limit:
            break
        kept.append(number)
    return [texts[number] for number in sorted(kept)]


@given(texts=TEXTS, limit=st.integers(0, 200), data=st.data())
def test_it_does_not_depend_on_order_or_parts(texts, limit, data):
    whole, parts = BoundedSample(limit), [BoundedSample(limit) for _ in range(3)]
    for number in data.draw(st.permutations(range(len(texts)))):
        data.draw(st.sampled_from(parts)).offer((3, number), texts[number])
    for part in data.draw(st.permutations(parts)):
        whole.add(part)
    assert whole.texts() == by_the_rule(texts, limit)


@given(texts=TEXTS, limit=st.integers(0, 200), cut=st.integers(0, 40))
def test_what_is_above_the_number_that_it_tells_need_not_be_offered(texts, limit, cut):
    first = BoundedSample(limit)
    for number, text in enumerate(texts[:cut]):
        first.offer((3, number), text)
    second = BoundedSample(limit, first.below)
    for number, text in enumerate(texts[cut:], min(cut, len(texts))):
        second.offer((3, number), text)
    first.add(second)
    assert list(first) == by_the_rule(texts, limit)
