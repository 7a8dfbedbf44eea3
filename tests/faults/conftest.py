"""One uninterrupted run per session, which the interrupted ones are compared with."""

import pytest

from megagpt.prepare import prepare_command, train_tokenizer_command
from tests import training


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = tmp_path_factory.mktemp("text")
    inputs = [str(training.write_text(text))]
    train_tokenizer_command(inputs, 320, folder / "text")
    prepare_command(inputs, folder / "text.model", folder / "text", validation_fraction=0.2)
    return folder


@pytest.fixture(scope="session")
def uninterrupted(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    training.finish(training.write_recipe(run, data))
    return run


@pytest.fixture
def recipe(data, tmp_path):
    return training.write_recipe(tmp_path / "run", data)
