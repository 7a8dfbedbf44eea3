"""Sampling: results do not depend on the cache, but on the seed, and the context shifts as documented."""

import pytest
import torch
import transformers

from megagpt.config.recipe import ModelSection
from megagpt.errors import UserError
from megagpt.inference.generate import GeneratedText, decode_continuation, draw, retained_tokens, sample
from megagpt.model.gpt import GPT


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
    """Draw each token after a full forward pass; drop the oldest quarter of 16 tokens when the context is full."""
    generator = torch.Generator().manual_seed(5)
    context, new = ids[-12:] if len(ids) > 16 else list(ids), []
    for _ in range(count):
        probabilities = model.eval()(torch.tensor([context])).logits[0, -1].softmax(-1)
        likeliest, order = probabilities.sort(descending=True)
        token = int(order[torch.multinomial(likeliest, 1, generator=generator)])
        new.append(token)
        context = (list(ids) + new)[-12:] if len(context) == 16 else [*context, token]
    return new


@pytest.mark.parametrize(
    "changes",
    [{}, {"position": "learned", "norm": "layernorm"}, {"qk_norm": True, "logit_softcap": 3.0}, {"n_kv_head": 4}],
)
@pytest.mark.parametrize("prompt", [1, 15, 16, 40])
def test_cached_sampling_equals_sampling_without_cache(changes, prompt):
    model = model_of(**changes)
    ids = torch.randint(61, (prompt,), generator=torch.Generator().manual_seed(2)).tolist()
    tokens = sample(model, ids, 24, seed=5)
    assert tokens == without_cache(model, ids, 24)
    assert len(set(tokens)) > 4


def test_logits_with_cache_equal_those_without():
    model = model_of(qk_norm=True)
    ids = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cache = model.new_kv_cache()
        steps = [model.decode(ids[:, :5], cache)] + [model.decode(ids[:, i : i + 1], cache) for i in range(5, 16)]
        expected = model(ids).logits[:, 4:]
    torch.testing.assert_close(torch.stack(steps, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_tokens_depend_on_the_seed_alone():
    model = model_of()
    torch.manual_seed(1)
    first = sample(model, [3], 30, seed=5)
    torch.manual_seed(2)  # the global generator is not used
    assert sample(model, [3], 30, seed=5) == first
    assert sample(model, [3], 30, seed=6) != first


def test_sampling_stops_before_the_end_of_document_token():
    model = model_of()
    tokens = sample(model, [3], 30, seed=5)
    end = tokens[10]
    assert sample(model, [3], 30, seed=5, eod=end) == tokens[: tokens.index(end)]


def test_an_empty_prompt_starts_a_document_or_is_an_error():
    model = model_of()
    assert sample(model, [], 8, eod=60) == sample(model, [60], 8, eod=60)
    with pytest.raises(UserError) as caught:
        sample(model, [], 8)
    assert str(caught.value) == ("megagpt: there is no text to continue\n  do: give at least one token as a prompt")


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_disabled_and_the_mode_restored(training):
    model = model_of(dropout=0.5).train(training)
    assert sample(model, [3], 12, temperature=0) == sample(model_of(), [3], 12, temperature=0)
    assert model.training is training


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.6), (7, 0.8), (1, None), (None, 1e-9), (99, None)])
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_draws_follow_the_probabilities_of_transformers(top_k, top_p, temperature):
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
    frequencies = torch.bincount(drawn, minlength=12) / count
    assert ((frequencies > 0) <= (expected > 0)).all()
    assert (
        frequencies - expected
    ).abs().max() < 5 * 0.5 / count**0.5  # five standard deviations of the widest frequency


def test_a_full_context_keeps_three_quarters():
    assert [retained_tokens(n) for n in (1, 2, 4, 128)] == [1, 2, 3, 96]


def test_generated_control_characters_are_replaced():
    assert str(GeneratedText("run", 1, "a\tb\n", "\x1b[2J\x08é 日")) == "a\tb\n\ufffd[2J\ufffdé 日"


class SpaceStripping:
    """A tokenizer of words that drops the space at the start of what it decodes, as SentencePiece models often do."""

    def decode(self, ids):
        return "".join(f" {'abc'[i]}" for i in ids)[1:]


def test_continuation_keeps_the_space_at_its_start():
    assert decode_continuation(SpaceStripping(), [0, 1], [2, 0]) == " c a"
    assert decode_continuation(SpaceStripping(), [], [2, 0]) == "c a"


@pytest.mark.parametrize("text", ["日本\u3000語", "10\u00a0km", "👩\u200d💻", "نمی\u200cخواهم", "a\u202fb", "a\tb\nc"])
def test_text_of_any_language_is_shown_as_it_is(text):
    assert str(GeneratedText("r", 1, text, text)) == text + text


def test_controls_of_a_model_are_replaced():
    assert str(GeneratedText("r", 1, "a", "\x1b[31m\r\u202e")) == "a\ufffd[31m\ufffd\ufffd"
