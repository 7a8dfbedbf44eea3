"""A move between layouts takes little more memory than training: no rank holds the whole state."""

import json

import pytest
from groups import SECONDS, launch

from megagpt.model import cost
from megagpt.recipe.sections import ModelSection

MODEL = ModelSection(n_layer=4, n_head=4, d_model=384, vocab_size=8192, seq_len=32)
STATE = 12 * cost.parameters(MODEL)  # a weight and two moments in fp32


@pytest.mark.parametrize(("source", "target"), [("tensor2-zero1", "zero3-2ranks"), ("zero3-2ranks", "pipeline2")])
def test_a_move_takes_the_memory_of_training_and_a_few_tensors(tmp_path, source, target):
    logs = [
        launch("memory_worker.py", 2, {"folder": str(tmp_path), work: case}, tmp_path, SECONDS)
        for work, case in (("save", source), ("load", target))
    ]
    for rank in range(2):
        path = tmp_path / f"memory-{rank}.json"
        assert path.exists(), logs
        memory = json.loads(path.read_text())
        assert memory["trained"] > STATE / 2  # it was measured
        extra = memory["loaded"] - memory["trained"]
        print(f"{source} -> {target}, rank {rank}: {extra / 1e6:.0f} MB more than training, state {STATE / 1e6:.0f} MB")
        assert extra < STATE / 3
