"""Run the model on a simulated GPU. Started by test_on_gpus.py as a process of its own.

torch's fake tensors have a device and a shape but no values, and refuse to mix devices as real ones do, so that code
that leaves a tensor on the host fails. The device is registered for this process, because torch's autograd does not
know `cuda` without CUDA. Its tensors report that they are on CUDA.
"""

import json
import sys
import traceback
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from megagpt.config.recipe import ModelSection
from megagpt.engine.init_model import recompute
from megagpt.engine.optim import muon
from megagpt.engine.parallel import tensor
from megagpt.engine.parallel import ulysses as sequence
from megagpt.model import fused_ops, loss
from megagpt.model.context import ContextBuilder
from megagpt.model.gpt import GPT
from megagpt.model.rotary import RotaryEmbedding

TINY = {"n_layer": 2, "n_head": 4, "n_kv_head": 4, "d_model": 32, "d_ff": 48, "vocab_size": 60, "seq_len": 16}
LLAMA = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 2, "tie_embeddings": False}
GPT2 = {"position": "learned", "norm": "layernorm", "activation": "gelu", "tie_embeddings": True}
SWITCHES = {**LLAMA, "activation": "relu2", "qk_norm": True, "logit_softcap": 3.0}
END = 59


def build(dtype=torch.float32, end=None, parts=1, **switches):
    """A GPT on the GPU, or the shard of one of `parts` tensor-parallel ranks."""
    section = ModelSection(**{**TINY, **switches})
    parallel = tensor.parallel_layers(section, tensor.TensorParallelGroup(torch.distributed.group.WORLD, 0, parts))
    with unset_fake_temporarily(), torch.device("meta"):
        model = GPT(section, end, parallel)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=gpu())))
    return model


def gpu():
    return torch.device("gpu", 0)


def ids(tokens=16):
    return torch.zeros(3, tokens, dtype=torch.int64, device=gpu())


def on_gpu(tensors):
    assert {one.device for one in tensors} == {gpu()}


def step(dtype=torch.float32, end=None, again=None, **switches):
    model = build(dtype, end, **switches)
    if again:
        recompute(model.layers, 2, again == "from host")
    output = model(ids(), labels=ids(), normalizer=7.0)
    assert output.loss.requires_grad
    assert (output.loss.device, output.loss.dtype) == (gpu(), torch.float32)
    assert output.logits.dtype == dtype
    on_gpu([output.logits])


class Context:
    """Replaces autograd's context. Backward is called directly, because the autograd engine needs real streams."""

    needs_input_grad = (True,) * 5

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@torch.no_grad()
def backward(dtype):
    def there_and_back(function, *inputs):
        context = Context()
        outputs = function.forward(context, *inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = function.backward(context, *(torch.empty_like(one) for one in outputs))
        on_gpu([*outputs, *(one for one in gradients if one is not None)])

    hidden, heads = (torch.empty(*shape, dtype=dtype, device=gpu()) for shape in ((3, 16, 32), (3, 16, 8, 8)))
    tables = RotaryEmbedding(8, 16, 1e4).contiguous(0, 16, gpu())
    group = torch.distributed.group.WORLD
    there_and_back(fused_ops._ReluSquared, hidden)
    there_and_back(fused_ops._NormAndRotate, heads, 2, tables, 1e-5)
    there_and_back(tensor.CopyToTensorParallelRegion, hidden, group)
    there_and_back(tensor.ReduceFromTensorParallelRegion, hidden, group)
    rows, weight = hidden.flatten(0, 1), torch.empty(60, 32, dtype=dtype, device=gpu())
    for share in (None, tensor.VocabParallelGroup(0, 60, group)):
        there_and_back(loss._ChunkedCrossEntropy, rows, weight, ids().flatten(), 3.0, share)


def generate(**switches):
    model = build(**switches).eval()
    cache = model.new_kv_cache()
    with torch.no_grad():
        on_gpu([model.decode(ids(tokens), cache) for tokens in (5, 1, 1)])


def sequences():
    ulysses = object.__new__(sequence.Ulysses)
    ulysses._degree, ulysses._group = 2, torch.distributed.group.WORLD
    ulysses.index = 1
    section = ModelSection(**TINY | LLAMA)
    context = ContextBuilder(section, END, ulysses).for_batch(ids(8))
    assert context.position_ids.shape == (3, 8)
    assert context.attention_mask.shape == (3, 1, 16, 16)
    on_gpu([context.position_ids, *context.rotary, context.attention_mask])


def muon_step():
    model = build(**LLAMA)
    matrices = [parameter for parameter in model.layers[1].parameters() if parameter.ndim == 2]
    norm = {"params": [model.layers[1].mlp_norm.weight], "lr": 0.1}
    optimizer = muon.Muon([norm, {"params": matrices, "lr": 0.1, "muon": True, "parts": 1}], 0.95)
    for matrix in matrices:
        matrix.grad = torch.zeros_like(matrix)
    optimizer.step()
    on_gpu([optimizer.state[matrix]["momentum_buffer"] for matrix in matrices])
    direction = muon.orthogonalize(torch.stack([matrices[0], matrices[0]]))
    on_gpu([direction])
    assert direction.dtype == torch.float32  # as on a CPU, so that the curves are the same


def mixed():
    model = build(**LLAMA)
    try:
        model(ids().cpu(), labels=ids())
    except RuntimeError as error:
        assert "device" in str(error)  # noqa: PT017  # not run by pytest
    else:
        raise AssertionError("fake tensors mix devices, so that no case here can fail")


CASES = {
    "devices do not mix": mixed,
    "gpt2": partial(step, **GPT2),
    "gpt2 in bf16": partial(step, torch.bfloat16, **GPT2),
    "llama": partial(step, **LLAMA),
    "llama in bf16": partial(step, torch.bfloat16, **LLAMA),
    "every switch in bf16": partial(step, torch.bfloat16, **SWITCHES),
    "dropout": partial(step, dropout=0.1, **GPT2),
    "documents": partial(step, end=END, **SWITCHES),
    "documents in bf16": partial(step, torch.bfloat16, END, **GPT2),
    "recomputed": partial(step, torch.bfloat16, END, "yes", **LLAMA),
    "recomputed from host": partial(step, torch.bfloat16, END, "from host", **LLAMA),
    "tensor parallelism": partial(step, torch.bfloat16, END, parts=2, **LLAMA),
    "tensor parallelism, tied": partial(step, parts=2, **GPT2),
    "sequence parallelism": sequences,
    "gradients": partial(backward, torch.float32),
    "gradients in bf16": partial(backward, torch.bfloat16),
    "generation": partial(generate, **GPT2),
    "generation, llama": partial(generate, **LLAMA),
    "muon": muon_step,
}


def main():
    """Print the error of each case as JSON, an empty string if there is none."""
    _setup_privateuseone_for_python_backend("gpu")
    torch.Tensor.is_cuda = property(lambda self: self.device.type == "gpu")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    wrong = {}
    for name, case in CASES.items():
        try:
            with FakeTensorMode():
                case()
            wrong[name] = ""
        except Exception:
            wrong[name] = traceback.format_exc()
    json.dump(wrong, sys.stdout)


if __name__ == "__main__":
    main()
