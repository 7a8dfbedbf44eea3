"""Attention within documents: each is what it would be alone, whatever lies before it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megagpt.engine.init_model import recompute
from megagpt.model import document_mask as documents
from megagpt.model.document_mask import Documents
from megagpt.model.gpt import GPT

END = 60
SHAPES = {
    "rope": {"position": "rope", "qk_norm": True, "n_kv_head": 2},
    "learned": {"position": "learned", "norm": "layernorm", "activation": "gelu"},
    "rotation without norm": {"position": "rope", "logit_softcap": 3.0, "tie_embeddings": True},
}


@pytest.fixture
def masked(tiny, random_gpt):
    """Two GPTs of the same weights: one that keeps within documents, and a plain one."""

    def build(**changes):
        section = tiny(**changes)
        plain = random_gpt(section)
        model = GPT(section, END)
        model.load_state_dict(plain.state_dict())
        return model, plain

    return build


@pytest.fixture
def ids():
    """[3, 16]: documents that end at tokens 5 and 9, one at its very first and last token, and one without an end."""
    ids = torch.randint(60, (3, 16), generator=torch.Generator().manual_seed(1))
    ids[0, 5] = ids[0, 9] = ids[1, 0] = ids[1, 15] = END
    return ids


def parts(row):
    """The documents of a row [T]."""
    cuts = [0, *((row == END).nonzero().flatten() + 1).tolist(), len(row)]
    return [row[a:b] for a, b in itertools.pairwise(cuts) if a < b]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_document_gets_the_logits_and_gradients_that_it_gets_alone(masked, ids, shape):
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
def test_a_change_in_one_document_leaves_the_bits_of_the_others_logits(masked, ids, shape):
    model, plain = masked(**SHAPES[shape])
    changed = ids.clone()
    changed[0, :5] = (ids[0, :5] + 7) % 60
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[0, 6:], after[0, 6:])
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0, :6], after[0, :6])
    assert not torch.equal(plain(ids).logits[0, 6:], plain(changed).logits[0, 6:])


def test_without_an_end_in_sight_nothing_changes(masked, ids):
    model, plain = masked()
    torch.testing.assert_close(model(ids[2:]).logits, plain(ids[2:]).logits, rtol=1e-5, atol=1e-5)


@given(st.lists(st.lists(st.integers(0, 3), min_size=12, max_size=12), min_size=1, max_size=3))
def test_bounds_are_those_of_a_slow_count(rows):
    documents = Documents(0)
    documents.see(torch.tensor(rows))
    for row, (ids, places) in enumerate(zip(rows, documents.now.places.tolist(), strict=True)):
        for query in range(12):
            begin = max((key + 1 for key in range(query) if ids[key] == 0), default=0)
            assert places[query] == query - begin
            seen = [key for key in range(12) if documents.now.mask[row, 0, query, key]]
            assert seen == list(range(begin, query + 1))


@pytest.mark.parametrize("on_host", [False, True])
def test_recomputation_remembers_the_documents_of_its_own_batch(masked, ids, on_host):
    model, _ = masked(n_layer=2)
    labels = ids.roll(-1, 1)

    def gradients():
        model.zero_grad()
        loss = model(ids, labels=labels).loss
        model(ids.roll(3, 1))  # another batch is seen before the first one's backward pass, as in a pipeline
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    recompute(model.layers, 2, on_host)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(), expected, strict=True))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_blocks_of_gpus_mask_what_the_pairs_of_cpus_mask(ids, kv_heads):
    """What GPUs run compiled, run by its plain form."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(3, 4, 16, 8, generator=generator)
    k, v = torch.randn(2, 3, kv_heads, 16, 8, generator=generator)
    ends = ids == END
    number = ends.cumsum(1) - ends.long()
    expected = F.scaled_dot_product_attention(q, k, v, documents._pairs(number), enable_gqa=kv_heads < 4)
    got = documents.attend(q, k, v, documents._blocks(number))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_generation_reads_a_prompt_as_one_document(masked, ids):
    model, plain = masked()
    with torch.no_grad():
        assert torch.equal(model.read(ids[:1], model.past()), plain.read(ids[:1], plain.past()))
