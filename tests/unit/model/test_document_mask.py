"""Document masking: a document's results do not depend on the documents before it in the sequence."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megagpt.engine.init_model import recompute
from megagpt.model import document_mask
from megagpt.model.document_mask import DocumentMask
from megagpt.model.gpt import GPT

END = 60
SHAPES = {
    "rope": {"position": "rope", "qk_norm": True, "n_kv_head": 2},
    "learned": {"position": "learned", "norm": "layernorm", "activation": "gelu"},
    "rotation without norm": {"position": "rope", "logit_softcap": 3.0, "tie_embeddings": True},
}


@pytest.fixture
def masked(tiny, random_gpt):
    """Return a function that builds two GPTs with the same weights: one with document masking, and one without."""

    def build(**changes):
        section = tiny(**changes)
        plain = random_gpt(section)
        model = GPT(section, END)
        model.load_state_dict(plain.state_dict())
        return model, plain

    return build


@pytest.fixture
def ids():
    """Token ids [3, 16]: documents end at tokens 5 and 9, then at the first and last token, then nowhere."""
    ids = torch.randint(60, (3, 16), generator=torch.Generator().manual_seed(1))
    ids[0, 5] = ids[0, 9] = ids[1, 0] = ids[1, 15] = END
    return ids


def parts(row):
    """Split a row [T] into its documents."""
    cuts = [0, *((row == END).nonzero().flatten() + 1).tolist(), len(row)]
    return [row[a:b] for a, b in itertools.pairwise(cuts) if a < b]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_document_has_the_logits_and_gradients_that_it_has_alone(masked, ids, shape):
    model, plain = masked(**SHAPES[shape])
    logits = model(ids).logits
    alone = torch.stack([torch.cat([plain(part[None]).logits[0] for part in parts(row)]) for row in ids])
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=2e-5)
    labels = ids.roll(-1, 1)
    model(ids, labels=labels).loss.backward()
    F.cross_entropy(alone.flatten(0, 1), labels.flatten()).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        scale = theirs.grad.abs().max()
        assert scale > 0, name
        assert (ours.grad - theirs.grad).abs().max() <= 2e-5 * scale, name


@pytest.mark.parametrize("shape", SHAPES)
def test_a_change_in_one_document_does_not_change_a_bit_of_the_logits_of_others(masked, ids, shape):
    model, plain = masked(**SHAPES[shape])
    changed = ids.clone()
    changed[0, :5] = (ids[0, :5] + 7) % 60
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[0, 6:], after[0, 6:])
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0, :6], after[0, :6])
    assert not torch.equal(plain(ids).logits[0, 6:], plain(changed).logits[0, 6:])


def test_without_document_ends_masking_changes_nothing(masked, ids):
    model, plain = masked()
    torch.testing.assert_close(model(ids[2:]).logits, plain(ids[2:]).logits, rtol=1e-5, atol=1e-5)


@given(st.lists(st.lists(st.integers(0, 3), min_size=12, max_size=12), min_size=1, max_size=3))
def test_position_ids_and_mask_equal_those_of_a_slow_loop(rows):
    position_ids, mask = DocumentMask(0).build(torch.tensor(rows))
    for row, (ids, positions) in enumerate(zip(rows, position_ids.tolist(), strict=True)):
        for query in range(12):
            begin = max((key + 1 for key in range(query) if ids[key] == 0), default=0)
            assert positions[query] == query - begin
            attended = [key for key in range(12) if mask[row, 0, query, key]]
            assert attended == list(range(begin, query + 1))


@pytest.mark.parametrize("on_host", [False, True])
def test_recomputation_uses_the_mask_of_its_own_batch(masked, ids, on_host):
    model, _ = masked(n_layer=2)
    labels = ids.roll(-1, 1)

    def gradients():
        model.zero_grad()
        loss = model(ids, labels=labels).loss
        model(ids.roll(3, 1))  # another batch runs before the first one's backward pass, as in a pipeline
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    recompute(model.layers, 2, on_host)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(), expected, strict=True))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_block_masks_equal_dense_masks(ids, kv_heads):
    """Runs the uncompiled form of the code that GPUs compile."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(3, 4, 16, 8, generator=generator)
    k, v = torch.randn(2, 3, kv_heads, 16, 8, generator=generator)
    ends = ids == END
    number = ends.cumsum(1) - ends.long()
    expected = F.scaled_dot_product_attention(q, k, v, document_mask.dense_mask(number), enable_gqa=kv_heads < 4)
    got = document_mask.attend_in_blocks(q, k, v, document_mask.block_mask(number))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_generation_treats_a_prompt_as_one_document(masked, ids):
    model, plain = masked()
    with torch.no_grad():
        assert torch.equal(model.decode(ids[:1], model.new_kv_cache()), plain.decode(ids[:1], plain.new_kv_cache()))
