"""Flat buffers whose shards consist of whole vectors, so that an optimizer rounds every element alike on CPUs.

torch's fused AdamW computes the last elements of a tensor one by one, with other rounding than the vectors before them.
The copies of a tied matrix lie at different offsets in the flat buffers of two pipeline stages: they would drift apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

_VECTOR = 16  # fp32 elements of the widest vectors, AVX-512's
_ALIGNED = 2  # elements to which DeepSpeed aligns the shards (nccl_start_alignment_factor)
_FLATTEN = (
    (DeepSpeedZeroOptimizer, "flatten_dense_tensors_aligned"),
    (BF16_Optimizer, "_flatten_dense_tensors_aligned"),
)


@contextmanager
def whole_vectors() -> Iterator[None]:
    """Let DeepSpeed's optimizers that are built meanwhile pad their flat buffers to whole vectors on every rank."""
    originals = [getattr(owner, name) for owner, name in _FLATTEN]

    def padded(flatten: Any) -> Any:
        def flatten_to_vectors(optimizer: Any, tensors: Any, alignment: int, **options: Any) -> Any:
            return flatten(optimizer, tensors, alignment * _VECTOR // _ALIGNED, **options)

        return flatten_to_vectors

    for (owner, name), original in zip(_FLATTEN, originals, strict=True):
        setattr(owner, name, padded(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(_FLATTEN, originals, strict=True):
            setattr(owner, name, original)
