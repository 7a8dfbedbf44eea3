"""Planned activation memory compared with the tensors that autograd saves, for every switch of the model."""

import itertools

import pytest
import torch

from megagpt.config.recipe import ModelSection
from megagpt.engine.parallel import tensor
from megagpt.model import layers
from megagpt.model.gpt import GPT, initialize
from megagpt.plan import activations

BATCH, TOKENS = 3, 16
DTYPES = {4: torch.float32, 2: torch.bfloat16}


def section(**changes):
    shape = {"n_layer": 2, "n_head": 4, "d_model": 64, "d_ff": 96, "vocab_size": 320, "seq_len": TOKENS}
    return ModelSection(**shape | changes)


def saved(run, parameters):
    """Return the bytes of the storages that a forward pass saves, without the given tensors."""
    given = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = run()
    del output
    return sum(storage.nbytes() for place, (storage, _) in kept.items() if place not in given)


def measured_block(given, element, recompute="no", degree=1):
    """Return the bytes that a block, or a shard of it, saves, without the rotary tables that all blocks share."""
    parallel = tensor.parallel_layers(given, tensor.TensorParallelGroup(torch.distributed.group.WORLD, 0, degree))
    model = GPT(given, parallel=parallel)
    tensor.init_tp_weights(model, "", given, 1, 0, degree)
    model.to(DTYPES[element])
    (block, *_) = (layer for layer in model.layers if isinstance(layer, layers.Block))
    block.recompute = recompute
    hidden = torch.randn(BATCH, TOKENS, given.d_model, dtype=DTYPES[element], requires_grad=True)
    context = model.contexts.for_batch(torch.zeros(BATCH, TOKENS))
    known = [*model.parameters(), *(context.rotary or ())]
    return saved(lambda: block(hidden, context), known)


def shape(given, element, degree=1):
    return activations.MicroBatchShape(given, BATCH * TOKENS, degree, 1, element)


SWITCHES = list(
    itertools.product(("gelu", "swiglu", "relu2"), ("layernorm", "rmsnorm"), ("learned", "rope"), (False, True), (4, 2))
)


@pytest.mark.parametrize(("activation", "norm", "position", "qk_norm", "kv_heads"), SWITCHES)
def test_a_block_saves_what_is_planned(activation, norm, position, qk_norm, kv_heads):
    given = section(activation=activation, norm=norm, position=position, qk_norm=qk_norm, n_kv_head=kv_heads)
    assert activations.block(shape(given, 4)) == measured_block(given, 4)


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "relu2"])
def test_a_block_in_bf16_saves_what_is_planned(activation):
    given = section(activation=activation, norm="rmsnorm", position="rope", qk_norm=True)
    assert activations.block(shape(given, 2)) == measured_block(given, 2)


def test_a_recomputed_block_saves_only_its_input():
    given = section()
    assert activations.recomputed_block(shape(given, 4)) == measured_block(given, 4, "yes")


@pytest.mark.usefixtures("collectives")
@pytest.mark.parametrize(("activation", "qk_norm"), [("gelu", False), ("swiglu", True)])
def test_a_tensor_parallel_shard_saves_what_is_planned(activation, qk_norm):
    given = section(activation=activation, qk_norm=qk_norm, position="rope", n_kv_head=2)
    assert activations.block(shape(given, 4, 2)) == measured_block(given, 4, degree=2)


@pytest.mark.parametrize("element", [4, 2])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_head_and_norm_save_two_gradients_and_the_input_of_the_norm(element, tie_embeddings):
    # rmsnorm, because torch saves layernorm's statistics in bf16 on CPUs but in fp32 on GPUs
    given = section(tie_embeddings=tie_embeddings, norm="rmsnorm")
    model = GPT(given)
    initialize(model, 1)
    model.to(DTYPES[element])
    hidden = torch.randn(BATCH, TOKENS, given.d_model, dtype=DTYPES[element], requires_grad=True)
    labels = torch.randint(320, (BATCH, TOKENS))
    measured = saved(lambda: model.layers[-1](model.layers[-2](hidden), labels), [*model.parameters(), labels])
    assert activations.final_norm(shape(given, element)) + activations.loss_gradients(shape(given, element)) == measured
