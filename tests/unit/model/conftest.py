"""A tiny model, with random values for all parameters, including norms and biases, so that no error is hidden."""

import pytest
import torch

from megagpt.config.recipe import ModelSection
from megagpt.model.gpt import GPT

TINY = {
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 4,
    "d_model": 32,
    "d_ff": 48,
    "vocab_size": 61,
    "seq_len": 16,
    "position": "rope",
    "norm": "rmsnorm",
    "activation": "relu2",
    "tie_embeddings": False,
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny():
    """Return a function that builds a tiny ModelSection with some keys changed."""
    return lambda **changes: ModelSection(**{**TINY, **changes})


@pytest.fixture
def random_gpt():
    """Return a function that builds a GPT with random weights, none of them 0 or 1."""

    def build(section, seed=0):
        model = GPT(section)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            mean = 1.0 if parameter.ndim == 1 else 0.0
            parameter.data.normal_(mean, 0.2, generator=generator)
        return model

    return build


@pytest.fixture
def batch():
    """Token ids [3, 16] below 61, and labels of which some are ignored at either end."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(61, (3, 17), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, :5] = labels[2, 9:] = -100
    return ids[:, :-1], labels
