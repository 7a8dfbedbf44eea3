"""Layouts whose memory is compared with the planner, with models in which every part takes noticeable memory."""

from __future__ import annotations

from typing import Any

from tests.parity.layouts import CPU, LLAMA, MUON, OFFLOADED, Case

# The loss computes the logits of at least 512 tokens at a time, so that 1,024 tokens per micro-batch are two chunks.
MODEL = ("model.d_model=128", "model.n_layer=4", "model.vocab_size=1024", "model.seq_len=256")
SMALL = {
    "reduce_bucket_size": 100_000,
    "stage3_prefetch_bucket_size": 50_000,
    "stage3_param_persistence_threshold": 1000,
}
SHORT = ("model.seq_len=16", "model.vocab_size=128", "model.n_layer=4")  # memory peaks in the optimizer step
DEEPER = ("model.n_layer=10",)
TENSOR = {"tensor_parallel": {"autotp_size": 2}}
AGAIN = {"activation_checkpointing": {"number_checkpoints": "auto"}}


def _zero(stage: int, micro: int, **more: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": micro, "zero_optimization": {"stage": stage, **SMALL, **more}}


BF16 = ("precision=bf16",)
WORLD = 4
# The last case leaves memory behind, that of DeepSpeed's bf16 optimizer, which would be freed during the next case.
CASES: tuple[Case, ...] = tuple(
    Case(f"plan-{name}", WORLD, config, (*MODEL, *overrides))
    for name, config, overrides in (
        ("zero0", _zero(0, 1), ()),
        ("zero0-muon-once", _zero(0, 3), (*MUON, *SHORT)),
        ("zero1-muon-once", _zero(1, 3), (*MUON, *SHORT)),
        ("zero3-muon", _zero(3, 1), (*MUON, *SHORT)),
        ("tensor2-muon-once", {**_zero(2, 6), **TENSOR}, (*MUON, *SHORT)),
        ("zero0-recompute", _zero(0, 3) | AGAIN, LLAMA),
        ("zero1-once", _zero(1, 3), LLAMA),
        ("zero1-offload-bf16", _zero(1, 1, offload_optimizer=CPU), BF16),
        ("zero2", _zero(2, 1), LLAMA),
        ("zero2-bf16", _zero(2, 1), BF16),
        ("zero2-offload", _zero(2, 1, offload_optimizer=CPU), ()),
        ("zero2-offload-bf16", _zero(2, 1, offload_optimizer=CPU), BF16),
        ("zero3", _zero(3, 1), ()),
        (
            "zero3-released-bf16",
            _zero(3, 1, stage3_max_live_parameters=400_000, stage3_max_reuse_distance=400_000),
            (*BF16, *DEEPER),
        ),
        ("zero3-offload-bf16", _zero(3, 1, **OFFLOADED), BF16),
        ("tensor2", {**_zero(1, 3), **TENSOR}, LLAMA),
        ("ulysses2", {**_zero(2, 3), "sequence_parallel_size": 2}, LLAMA),
        ("pipeline2", {**_zero(1, 2), "pipeline": {"stages": 2}}, LLAMA),
        ("pipeline2-tensor2-recompute", {**_zero(1, 3), "pipeline": {"stages": 2}, **TENSOR} | AGAIN, LLAMA),
        ("zero1-bf16", _zero(1, 1), BF16),
    )
)
