"""What a failure is told with."""

import torch

from megagpt.training import recovery


def test_memory_that_ran_out_comes_with_what_to_try():
    said = recovery.advice(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    for part in (
        "ds.train_micro_batch_size_per_gpu=1",
        "number_checkpoints=auto",
        "megagpt plan",
        "expandable_segments",
    ):
        assert part in said
    assert recovery.advice(RuntimeError("NCCL error")) == ""
