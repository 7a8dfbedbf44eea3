"""A bounded sample follows its rule, however the texts are grouped and ordered."""

import hashlib
import struct

from hypothesis import given
from hypothesis import strategies as st

from megagpt.tokenizer.line_sample import BoundedSample

TEXTS = st.lists(st.text("aé中", max_size=9), max_size=40)


def expected_sample(texts, limit):
    """Return the texts with the smallest hashes, up to the first that does not fit, in their order."""
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
def test_the_sample_does_not_depend_on_order_or_grouping(texts, limit, data):
    whole, parts = BoundedSample(limit), [BoundedSample(limit) for _ in range(3)]
    for number in data.draw(st.permutations(range(len(texts)))):
        data.draw(st.sampled_from(parts)).add((3, number), texts[number])
    for part in data.draw(st.permutations(parts)):
        whole.merge(part)
    assert whole.texts() == expected_sample(texts, limit)


@given(texts=TEXTS, limit=st.integers(0, 200), cut=st.integers(0, 40))
def test_texts_above_the_threshold_need_not_be_added(texts, limit, cut):
    first = BoundedSample(limit)
    for number, text in enumerate(texts[:cut]):
        first.add((3, number), text)
    second = BoundedSample(limit, first.threshold)
    for number, text in enumerate(texts[cut:], min(cut, len(texts))):
        second.add((3, number), text)
    first.merge(second)
    assert list(first) == expected_sample(texts, limit)
