"""No rank ever holds the whole model or the whole training state if these are sharded."""

import json

import pytest

from megagpt.config.recipe.sections import ModelSection
from megagpt.model import flops
from tests.parity.groups import SECONDS, launch

MODEL = ModelSection(n_layer=4, n_head=4, d_model=384, vocab_size=8192, seq_len=32)
STATE = 12 * flops.parameters(MODEL)  # a weight and two moments in fp32


@pytest.fixture(autouse=True)
def return_freed_memory(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # otherwise glibc keeps freed memory in its heap


@pytest.mark.parametrize(("source", "target"), [("tensor2-zero1", "zero3-2ranks"), ("zero3-2ranks", "pipeline2")])
def test_loading_on_another_layout_takes_little_more_memory_than_training(tmp_path, source, target):
    logs = [
        launch("memory_worker", 2, {"folder": str(tmp_path), work: case}, tmp_path, SECONDS)
        for work, case in (("save", source), ("load", target))
    ]
    for rank in range(2):
        path = tmp_path / f"memory-{rank}.json"
        assert path.exists(), logs
        memory = json.loads(path.read_text())
        assert memory["trained"] > STATE / 2  # the measurement works
        extra = memory["loaded"] - memory["trained"]
        print(f"{source} -> {target}, rank {rank}: {extra / 1e6:.0f} MB more than training, state {STATE / 1e6:.0f} MB")
        assert extra < STATE / 10


def test_at_stage_3_each_rank_builds_only_its_partition(tmp_path):
    section = ModelSection(n_layer=16, n_head=4, d_model=384, vocab_size=512, seq_len=32)
    whole, largest = 4 * flops.parameters(section), 4 * section.d_model * section.d_ff
    log = launch("memory_worker", 2, {"folder": str(tmp_path), "build": "zero3-2ranks"}, tmp_path, SECONDS)
    for rank in range(2):
        path = tmp_path / f"memory-{rank}.json"
        assert path.exists(), log
        built = json.loads(path.read_text())["built"]
        print(f"rank {rank}: {built / 1e6:.0f} MB to build its half of {whole / 1e6:.0f} MB")
        assert 0.4 * whole < built < whole / 2 + 4 * largest < 0.6 * whole
