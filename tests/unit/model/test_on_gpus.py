"""What a GPU does otherwise, proven where there is none: nothing is left on the host, and values are the same."""

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


class Pretender(torch.Tensor):
    """A tensor in host memory that says that it is on a GPU; what is made of it says so, too."""

    is_cuda = True


@pytest.fixture(scope="module")
def wrong():
    """What went wrong in each case of the worker."""
    worker = Path(__file__).with_name("gpu_worker.py")
    ended = subprocess.run([sys.executable, worker], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("case", CASES)
def test_everything_keeps_to_the_gpu(wrong, case):
    assert wrong[case] == "", wrong[case]


@pytest.mark.parametrize("masked", [False, True])
def test_grouped_heads_attend_the_same_where_kernels_know_no_groups(tiny, random_gpt, masked):
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
        got = attention.attend(*(one.as_subclass(Pretender) for one in (q, k, v)), mask=mask)
    assert called == [(2, True), (4, False)]
    torch.testing.assert_close(got.as_subclass(torch.Tensor), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cut", [False, True])
def test_a_checksum_made_on_a_gpu_is_the_one_made_on_the_host(monkeypatch, cut):
    monkeypatch.setattr(tensor_files, "_CHUNK_ON_GPU", 7)
    tensor = torch.randn(100, generator=torch.Generator().manual_seed(4))
    places = torch.randperm(100, generator=torch.Generator().manual_seed(5)) if cut else 12345678901
    assert tensor_files.checksum(tensor.as_subclass(Pretender), places) == tensor_files.checksum(tensor, places)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_kernels_for_documents_are_compiled_once_for_a_shape(monkeypatch):
    """Each batch brings a mask of its own; were it compiled anew, that would take longer than training."""
    counted = CompileCounter()
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    for function in (document_mask.create_block_mask, document_mask.flex_attention):
        monkeypatch.setattr(document_mask, function.__name__, torch.compile(function, backend=counted, dynamic=False))
    q = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(6))
    graphs = []
    for seed in range(3):
        number = torch.randint(2, (2, 16), generator=torch.Generator().manual_seed(seed)).cumsum(1)
        got = document_mask.attend(q, q, q, document_mask._blocks(number))
        expected = F.scaled_dot_product_attention(q, q, q, document_mask._pairs(number))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        graphs.append(counted.frame_count)
    assert graphs[0] > 0
    assert graphs == graphs[:1] * 3
