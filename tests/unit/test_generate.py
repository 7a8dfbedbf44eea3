"""Sampling: the cache changes nothing, the seed decides, the window slides as documented."""

import pytest
import torch
import transformers

from megagpt.errors import UserError
from megagpt.generate import Text, draw, kept, sample
from megagpt.model.gpt import GPT
from megagpt.recipe import ModelSection


def model_of(**changes):
    keys = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 32, "vocab_size": 61, "seq_len": 16}
    section = ModelSection(**{**keys, "position": "rope", "norm": "rmsnorm", "tie_embeddings": False, **changes})
    model = GPT(section)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(float(parameter.ndim == 1 and "weight" in name), 0.2, generator=generator)
    return model


@torch.no_grad()
def without_cache(model, ids, count):
    """Draw each token after a whole forward pass; forget the oldest quarter of 16 when full."""
    generator = torch.Generator().manual_seed(5)
    window, new = ids[-12:] if len(ids) > 16 else list(ids), []
    for _ in range(count):
        probabilities = model.eval()(torch.tensor([window])).logits[0, -1].softmax(-1)
        likeliest, order = probabilities.sort(descending=True)
        token = int(order[torch.multinomial(likeliest, 1, generator=generator)])
        new.append(token)
        window = (list(ids) + new)[-12:] if len(window) == 16 else [*window, token]
    return new


@pytest.mark.parametrize(
    "changes",
    [{}, {"position": "learned", "norm": "layernorm"}, {"qk_norm": True, "logit_softcap": 3.0}, {"n_kv_head": 4}],
)
@pytest.mark.parametrize("prompt", [1, 15, 16, 40])
def test_the_cache_and_the_sliding_window_change_nothing(changes, prompt):
    model = model_of(**changes)
    ids = torch.randint(61, (prompt,), generator=torch.Generator().manual_seed(2)).tolist()
    tokens = sample(model, ids, 24, seed=5)
    assert tokens == without_cache(model, ids, 24)
    assert len(set(tokens)) > 4


def test_cached_logits_are_the_logits():
    model = model_of(qk_norm=True)
    ids = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cache = model.new_kv_cache()
        steps = [model.decode(ids[:, :5], cache)] + [model.decode(ids[:, i : i + 1], cache) for i in range(5, 16)]
        expected = model(ids).logits[:, 4:]
    torch.testing.assert_close(torch.stack(steps, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_the_seed_decides():
    model = model_of()
    torch.manual_seed(1)
    first = sample(model, [3], 30, seed=5)
    torch.manual_seed(2)  # the global generator takes no part
    assert sample(model, [3], 30, seed=5) == first
    assert sample(model, [3], 30, seed=6) != first


def test_it_stops_at_the_end_of_a_document_and_does_not_say_so():
    model = model_of()
    tokens = sample(model, [3], 30, seed=5)
    end = tokens[10]
    assert sample(model, [3], 30, seed=5, eod=end) == tokens[: tokens.index(end)]


def test_nothing_to_continue_starts_a_document_or_is_an_error():
    model = model_of()
    assert sample(model, [], 8, eod=60) == sample(model, [60], 8, eod=60)
    with pytest.raises(UserError) as caught:
        sample(model, [], 8)
    assert str(caught.value) == ("megagpt: there is no text to continue\n  do: give at least one token as a prompt")


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_given_back(training):
    model = model_of(dropout=0.5).train(training)
    assert sample(model, [3], 12, temperature=0) == sample(model_of(), [3], 12, temperature=0)
    assert model.training is training


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.6), (7, 0.8), (1, None), (None, 1e-9), (99, None)])
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_draws_follow_transformers_probabilities(top_k, top_p, temperature):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(8)) * 2
    expected = logits.unsqueeze(0) / temperature
    if top_k is not None:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    expected = expected[0].softmax(-1)
    generator = torch.Generator().manual_seed(1)
    count = 2000
    drawn = torch.tensor([draw(logits, temperature, top_k, top_p, generator) for _ in range(count)])
    shares = torch.bincount(drawn, minlength=12) / count
    assert ((shares > 0) <= (expected > 0)).all()
    assert (shares - expected).abs().max() < 5 * 0.5 / count**0.5  # five sigma of the widest share


def test_a_full_window_keeps_three_quarters():
    assert [kept(n) for n in (1, 2, 4, 128)] == [1, 2, 3, 96]


def test_control_characters_of_a_model_do_not_reach_a_terminal():
    assert str(Text("run", 1, "a\tb\n", "\x1b[2J\x08é 日")) == "a\tb\n\ufffd[2J\ufffdé 日"
