"""Code that runs differently on GPUs, tested without one: no tensor is left on the host, and values are the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gpu_worker import CASES
from torch._dynamo.testing import CompileCounter

from megagpt.checkpoint import tensor_files
from megagpt.model import document_mask


class PretendedGpuTensor(torch.Tensor):
    """A tensor in host memory that reports that it is on a GPU, as do the results of operations on it."""

    is_cuda = True


@pytest.fixture(scope="module")
def wrong():
    """The error of each case of the worker, or an empty string."""
    worker = Path(__file__).with_name("gpu_worker.py")
    ended = subprocess.run([sys.executable, worker], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_stays_on_the_gpu(wrong, case):
    assert wrong[case] == "", wrong[case]


@pytest.mark.parametrize("masked", [False, True])
def test_grouped_attention_is_the_same_without_kernels_for_groups(tiny, random_gpt, masked):
    attention = random_gpt(tiny(n_kv_head=2)).layers[1].attention
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 16, heads, 8, generator=generator) for heads in (4, 2, 2))
    mask = torch.ones(16, 16, dtype=torch.bool).tril() if masked else None
    called = []

    def spy(*arguments, enable_gqa):
        called.append((arguments[1].shape[1], enable_gqa))
        return plain(*arguments, enable_gqa=enable_gqa)

    plain = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        expected = attention.attend(q, k, v, mask=mask)
        got = attention.attend(*(one.as_subclass(PretendedGpuTensor) for one in (q, k, v)), mask=mask)
    assert called == [(2, True), (4, False)]
    torch.testing.assert_close(got.as_subclass(torch.Tensor), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cut", [False, True])
def test_checksums_are_equal_on_gpu_and_host(monkeypatch, cut):
    monkeypatch.setattr(tensor_files, "_CHUNK_ON_GPU", 7)
    tensor = torch.randn(100, generator=torch.Generator().manual_seed(4))
    indices = torch.randperm(100, generator=torch.Generator().manual_seed(5)) if cut else 12345678901
    assert tensor_files.checksum(tensor.as_subclass(PretendedGpuTensor), indices) == tensor_files.checksum(
        tensor, indices
    )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_document_mask_kernels_are_compiled_once_per_shape(monkeypatch):
    """Each batch has a mask of its own. Compiling for each of them would take longer than training."""
    counted = CompileCounter()
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    for function in (document_mask.create_block_mask, document_mask.flex_attention):
        monkeypatch.setattr(document_mask, function.__name__, torch.compile(function, backend=counted, dynamic=False))
    q = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(6))
    graphs = []
    for seed in range(3):
        number = torch.randint(2, (2, 16), generator=torch.Generator().manual_seed(seed)).cumsum(1)
        got = document_mask.attend_in_blocks(q, q, q, document_mask.block_mask(number))
        expected = F.scaled_dot_product_attention(q, q, q, document_mask.dense_mask(number))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        graphs.append(counted.frame_count)
    assert graphs[0] > 0
    assert graphs == graphs[:1] * 3
