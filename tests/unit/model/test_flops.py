"""Computed parameter counts and FLOPs compared with the modules, published counts and torch's FLOP counter."""

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megagpt.config.recipe import PRESETS, ModelSection
from megagpt.model import flops
from megagpt.model.gpt import GPT
from megagpt.model.shapes import layer_shapes

# Hugging Face's count of the published checkpoints (safetensors metadata, without the buffers of GPT-2's masks)
PUBLISHED = {"gpt2-124m": 124_439_808, "gpt2-1.5b": 1_557_611_200, "llama-1b": 1_100_048_384, "llama-7b": 6_738_415_616}


def counted(section):
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in GPT(section).named_parameters()}


def listed(section):
    return {name: shape for layer in layer_shapes(section) for name, shape in layer.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_parameters_of_every_preset_are_those_listed(preset):
    section = ModelSection(preset=preset)
    assert listed(section) == counted(section)
    assert flops.parameters(section) == PUBLISHED.get(preset, flops.parameters(section))


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_the_parameters_are_those_listed_with_every_switch(tiny, norm, position):
    for activation, tied, kv_heads in itertools.product(("gelu", "swiglu", "relu2"), (True, False), (4, 2)):
        section = tiny(norm=norm, position=position, activation=activation, tie_embeddings=tied, n_kv_head=kv_heads)
        assert listed(section) == counted(section)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flops_equal_those_that_torch_counts(tiny, batch, activation, tied, kv_heads):
    section = tiny(activation=activation, tie_embeddings=tied, n_kv_head=kv_heads)
    model = GPT(section)
    ids, labels = batch
    # torch does not count fused attention on CPUs; unfused, it is two matrix products per direction
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, labels=labels).loss.backward()
    assert counter.get_total_flops() == flops.flops_per_token(section) * ids.numel()


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA GH200 480GB", "bf16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312e12),
        ("A100-80", "bf16", 312e12),  # the name in `megagpt plan --device`
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA A10G", "bf16", None),  # another chip
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("Tesla V100-PCIE-16GB", "fp16", 112e12),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("AMD Instinct MI300X", "bf16", 1307e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA GeForce RTX 5090", "bf16", None),
    ],
)
def test_peak_flops_are_those_of_the_data_sheet_or_unknown(device, precision, peak):
    assert flops.peak_flops(device, precision) == peak
