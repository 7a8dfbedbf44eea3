"""`megagpt.load_model`: a run directory as a Python object, without DeepSpeed and without the command line."""

import subprocess
import sys

import pytest
import torch

import megagpt
from megagpt.checkpoint import weights
from megagpt.checkpoint.async_saver import Saver
from megagpt.checkpoint.store import Store
from megagpt.config import recipe as recipes
from megagpt.errors import UserError
from megagpt.inference.generate import generate
from megagpt.model.gpt import GPT
from megagpt.state import TrainState
from tests.training import write_recipe


@pytest.fixture
def saved_run(tmp_path, data):
    """Return a function that publishes a model with known weights as a run; it returns the run and the model."""

    def publish(*overrides):
        run = tmp_path / "run"
        recipe = recipes.load(write_recipe(run, data), overrides)
        model, generator = GPT(recipe.model).eval(), torch.Generator().manual_seed(4)
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.2, generator=generator)
        run.mkdir()
        (run / "recipe.yaml").write_text(recipes.to_yaml(recipe))
        saver = Saver(Store(run), lambda sink: weights.save(model.named_parameters(), sink), {}, False)
        saver.save(TrainState(update=30))
        return run, model

    return publish


def test_logits_of_ids_and_of_text_are_those_of_the_saved_weights(saved_run):
    run, model = saved_run()
    loaded = megagpt.load_model(str(run))
    ids = loaded.tokenizer.encode("the of and to")
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    assert loaded.logits("the of and to").shape == (len(ids), 320)
    assert torch.equal(loaded.logits("the of and to").cpu(), expected)
    assert torch.equal(loaded.logits(ids).cpu(), expected)
    assert (loaded.update, loaded.recipe.model.seq_len) == (30, 32)


def test_it_generates_what_the_command_generates(saved_run):
    run, _ = saved_run()
    prompt = "the of and"
    options = {"tokens": 12, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "seed": 3}
    continuation = megagpt.load_model(run).generate(prompt, **options)
    assert continuation == generate(run, prompt, **options).continuation
    assert continuation


@pytest.mark.parametrize("count", [0, 33])
def test_texts_without_tokens_or_longer_than_the_context_are_refused(saved_run, count):
    run, _ = saved_run()
    with pytest.raises(UserError, match=f"the model reads 1 to 32 tokens, not {count}"):
        megagpt.load_model(run).logits([5] * count)


def test_without_a_tokenizer_only_ids_are_read(saved_run):
    run, _ = saved_run("data.tokenizer=null", "evaluation.prompt=null")
    loaded = megagpt.load_model(run)
    assert loaded.logits([5, 6]).shape == (2, 320)
    for use in (loaded.logits, loaded.generate):
        with pytest.raises(UserError, match="text needs a tokenizer"):
            use("the of")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no trained model here"):
        megagpt.load_model(tmp_path)


def test_it_loads_no_deepspeed(saved_run):
    run, _ = saved_run()
    program = (
        "import sys, megagpt; assert 'torch' not in sys.modules; "
        f"megagpt.load_model({str(run)!r}).logits([5]); "
        "assert 'torch' in sys.modules; assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
