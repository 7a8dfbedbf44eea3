"""Exported models: transformers, given only the folder, computes the same logits and the same token ids."""

import json
from types import SimpleNamespace as Space

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.checkpoint import loaded_model
from megagpt.cli import main
from megagpt.config.recipe import ModelSection
from megagpt.errors import MachineError, UserError
from megagpt.inference import export
from megagpt.inference.generate import sample
from megagpt.model.gpt import GPT
from megagpt.prepare.readers.default_corpus import default_corpus
from megagpt.tokenizer.tokenizer import Tokenizer, train_tokenizer
from tests.training import finish, write_recipe

ROPE = {"position": "rope", "norm": "rmsnorm", "rope_theta": 500.0}
GPT2 = {"position": "learned", "norm": "layernorm"}
SHAPES = {
    "gpt2": ("GPT2LMHeadModel", {**GPT2, "activation": "gelu"}),
    "gpt2-untied-relu2": ("GPT2LMHeadModel", {**GPT2, "activation": "relu2", "tie_embeddings": False}),
    "llama": ("LlamaForCausalLM", {**ROPE, "activation": "swiglu", "n_kv_head": 2, "tie_embeddings": False}),
    "llama-tied-relu2": ("LlamaForCausalLM", {**ROPE, "activation": "relu2", "n_kv_head": 1}),
    "qwen3": ("Qwen3ForCausalLM", {**ROPE, "activation": "swiglu", "qk_norm": True, "n_kv_head": 2}),
    "quickstart": ("Qwen3ForCausalLM", {**ROPE, "activation": "relu2", "qk_norm": True, "tie_embeddings": False}),
}


def model_of(**changes):
    section = ModelSection(**{"n_layer": 2, "n_head": 4, "d_model": 32, "vocab_size": 61, "seq_len": 24, **changes})
    model, generator = GPT(section).eval(), torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(float(parameter.ndim == 1 and "weight" in name), 0.2, generator=generator)
    return model


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a function that makes `trained.load` return a model without a tokenizer."""

    def put(precision="fp32", **changes):
        model = model_of(**changes)
        recipe = Space(precision=precision, model=model.section, data=Space(tokenizer=None))
        found = loaded_model.LoadedModel(recipe, Space(state=Space(update=7)), model)
        monkeypatch.setattr(loaded_model, "load", lambda _: found)
        return model

    return put


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same_logits(run, tmp_path, shape):
    architecture, changes = SHAPES[shape]
    ours = run(**changes)
    result = export.export(tmp_path, tmp_path / "out")
    assert result.architecture == architecture
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == architecture
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float32}
    ids = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        expected, actual = ours(ids).logits, theirs(input_ids=ids).logits
        greedy = theirs.generate(ids[:1, :5], max_new_tokens=12, do_sample=False)[0, 5:].tolist()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert greedy == sample(ours, ids[0, :5].tolist(), 12, temperature=0)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"), [("bf16", None, "bfloat16"), ("fp32", "float16", "float16")]
)
def test_weights_have_the_precision_of_training_or_the_requested_dtype(run, tmp_path, precision, dtype, expected):
    ours = run(precision, **SHAPES["qwen3"][1])
    before = ours.layers[0].weight.clone()
    assert export.export(tmp_path, tmp_path / "out", dtype=dtype).dtype == expected
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == getattr(torch, expected)
    assert torch.equal(theirs.model.embed_tokens.weight, before.to(getattr(torch, expected)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({**ROPE, "activation": "gelu"}, "rmsnorm with gelu"),
        ({**GPT2, "activation": "swiglu"}, "layernorm with swiglu"),
        ({**GPT2, "position": "rope"}, "layernorm with rope"),
        ({**ROPE, "position": "learned"}, "rmsnorm with learned positions"),
        ({**GPT2, "qk_norm": True}, "layernorm with qk_norm"),
        ({**GPT2, "n_kv_head": 2}, "layernorm with shared key and value heads"),
        ({**ROPE, "activation": "swiglu", "logit_softcap": 15.0}, "logit_softcap: 15"),
    ],
)
def test_models_without_an_equivalent_architecture_are_rejected(run, tmp_path, changes, problem):
    run(**changes)
    with pytest.raises(UserError) as caught:
        export.export(tmp_path, tmp_path / "out")
    assert str(caught.value) == (
        f"megagpt: transformers has no equivalent architecture: {problem}\n  model\n"
        "  do: layernorm with learned positions (GPT-2) and rmsnorm with rope (Llama, Qwen3) can be exported"
    )
    assert not (tmp_path / "out").exists()


def test_a_wrong_export_is_never_published(run, tmp_path, monkeypatch):
    run(**SHAPES["llama"][1])
    real = export.architectures._LLAMA
    monkeypatch.setattr(export.architectures, "_LLAMA", {**real, "mlp.gate": "mlp.up_proj", "mlp.up": "mlp.gate_proj"})
    with pytest.raises(MachineError, match="the exported model is not equivalent"):
        export.export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_reported(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    run(**SHAPES["llama"][1])
    messages = []
    for arguments in ({"to": "onnx"}, {"dtype": "int8"}, {"output": tmp_path / "full"}):
        with pytest.raises(UserError) as caught:
            export.export(tmp_path, **{"output": tmp_path / "out", **arguments})
        messages.append(str(caught.value))
    assert messages == [
        "megagpt: unknown format onnx\n  --to\n  do: give hf: many libraries read Hugging Face's format",
        "megagpt: unsupported dtype int8\n  --dtype\n  do: give float32, bfloat16, float16",
        f"megagpt: the output folder is not empty\n  {tmp_path / 'full'}\n  do: choose another one, or remove it",
    ]


@pytest.fixture(scope="module")
def tokenizers_of_both(tmp_path_factory):
    """Return our tokenizer and that of transformers after the export."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [document.text for document in default_corpus().documents[:40]]
    path = train_tokenizer(texts, 2000, folder / "t")
    assert export.vocabularies.save_tokenizer(transformers, str(path), folder / "out", 128) == str(path)
    return Tokenizer(path), transformers.AutoTokenizer.from_pretrained(folder / "out")


def test_documents_have_the_same_ids(tokenizers_of_both):
    ours, theirs = tokenizers_of_both
    for document in default_corpus().documents[40:60]:
        ids = ours.encode(document.text)
        assert theirs.encode(document.text) == ids
        assert theirs.decode(ids) == document.text
    assert (theirs.eos_token_id, theirs.model_max_length) == (ours.eod, 128)


AWKWARD = st.text(st.sampled_from("aAeion  \n\t\r▁½ﬁ語é\u0301🙂0123.,<>=-"), max_size=60)


@settings(max_examples=300, deadline=None)
@given(st.one_of(AWKWARD, st.text(max_size=40)))
def test_any_text_has_the_same_ids(tokenizers_of_both, text):
    ours, theirs = tokenizers_of_both
    if "<eod>" in text or "<unk>" in text or "\ud800" <= max(text, default="") <= "\udfff":
        return
    text = text.encode("utf-8", "replace").decode()
    assert theirs.encode(text) == ours.encode(text)


def test_a_tokenizer_json_is_exported_and_others_are_not(tokenizers_of_both, tmp_path):
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 2, "<unk>": 3}, "<unk>"))
    fast.add_special_tokens(["</s>", "<unk>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    export.vocabularies.save_tokenizer(transformers, str(tmp_path / "tokenizer.json"), tmp_path / "out", 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.encode("b"), theirs.eos_token) == ([1], "</s>")
    lines = iter([document.text[:2000] for document in default_corpus().documents[:20]])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(tmp_path / "theirs"), vocab_size=300, minloglevel=2
    )
    assert (
        export.vocabularies.save_tokenizer(transformers, str(tmp_path / "theirs.model"), tmp_path / "none", 64) is None
    )
    assert not (tmp_path / "none").exists()


def test_a_trained_run_is_exported(data, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "run", data)
    finish(recipe, "length.updates=10", "model.activation=swiglu")
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["update"], made["architecture"], made["dtype"]) == (10, "LlamaForCausalLM", "float32")
    assert made["difference"] < 1e-5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = loaded_model.load(tmp_path / "run").model
    ids = torch.tensor([tokenizer.encode("the of and to in that is")])
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids).logits).abs().max() < 1e-4
