"""Published runs of others, with which the planner is compared. Each group of rows names its source.

They used other code: full logits in fp32 where ours are chunked, attention scores without flash attention, and
gradients in fp32 in Megatron and nanotron. A planned peak should therefore be near theirs, but not equal to it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megagpt.plan import Plan, PlanOptions, plan

RECIPE = """\
run_dir: runs/none
precision: {precision}
model: {{n_layer: {layers}, d_model: {width}, n_head: {heads}, vocab_size: {vocabulary}, seq_len: {tokens}, {rest}}}
data: {{train: none}}
batch: {{global_size: {batch}}}
optimizer: {{type: adamw, lr: 1.0e-4}}
schedule: {{type: warmup_decay, warmup_updates: 0}}
length: {{updates: 1}}
"""
LLAMA = "position: rope, norm: rmsnorm, activation: swiglu, tie_embeddings: false"
FFN = {8: f"{LLAMA}, n_kv_head: 8, d_ff: 14336", 32: f"{LLAMA}, d_ff: 11008", 70: f"{LLAMA}, n_kv_head: 8, d_ff: 28672"}


@dataclass(frozen=True)
class Run:
    """One published run: model, layout, and reported memory and time."""

    name: str
    layers: int
    width: int
    heads: int
    batch: int
    ranks: int
    device: str
    stage: int = 1
    micro: int = 1
    tensor: int = 1
    stages: int = 1
    recomputed: bool = False
    precision: str = "bf16"
    vocabulary: int = 51_200
    tokens: int = 2048
    rest: str = "position: learned"
    peak: float | None = None
    """in GB as published, taken as GiB"""
    seconds: float | None = None
    """per update"""

    def planned(self, folder: Path) -> Plan:
        """Return the plan of this run."""
        recipe, config = folder / "recipe.yaml", folder / "config.json"
        recipe.write_text(RECIPE.format(**vars(self)))
        keys = {
            "train_micro_batch_size_per_gpu": self.micro,
            "zero_optimization": {"stage": self.stage},
            "tensor_parallel": {"autotp_size": self.tensor},
            "pipeline": {"stages": self.stages},
            **({"activation_checkpointing": {"number_checkpoints": "auto"}} if self.recomputed else {}),
        }
        config.write_text(json.dumps(keys))
        return plan(PlanOptions(recipe, config, world_size=self.ranks, device=self.device))


def _bloom(name: str, layers: int, width: int, heads: int, **more: object) -> Run:
    """bigscience-workshop/bigscience, train/tr11-176B-ml/chronicles-prequel.md; memory by nvidia-smi."""
    return Run(name, layers, width, heads, ranks=384, device="A100-80", recomputed=True, vocabulary=250_880, **more)  # type: ignore[arg-type]


def _nanotron(name: str, layers: int, width: int, heads: int, ranks: int, **more: object) -> Run:
    """huggingface/nanotron docs/benchmark_summary.svg; gradients in fp32; shapes inferred from parameter counts."""
    shape = {"vocabulary": 131_072, "tokens": 4096, "device": "H100", "batch": 256}
    return Run(name, layers, width, heads, ranks=ranks, **{**shape, **more})  # type: ignore[arg-type]


def _foundry(name: str, layers: int, width: int, device: str, batch: int, per_second: float, **more: object) -> Run:
    """mosaicml/llm-foundry scripts/train/benchmarking/README.md: FSDP, which is ZeRO-3; tokens per second and GPU."""
    tokens = int(more.get("tokens", 2048))  # type: ignore[call-overload]
    seconds = batch * tokens / (8 * per_second)
    heads = width // (64 if width < 1024 else 128)
    return Run(
        name, layers, width, heads, batch, 8, device, 3, vocabulary=50_368, seconds=seconds, **more  # type: ignore[arg-type]
    )  # fmt: skip


OUT_OF_MEMORY = _bloom("bloom-tp8-dp48", 72, 14336, 64, batch=2016, tensor=8, micro=1, precision="fp16")
PEAKS = (
    _bloom("bloom-tp8-pp12", 72, 14336, 64, batch=2048, tensor=8, stages=12, micro=2, precision="fp16", peak=37),
    _bloom("bloom-tp8-pp6", 72, 14336, 64, batch=2048, tensor=8, stages=6, micro=4, precision="fp16", peak=56),
    _bloom("bloom-tp2-pp12", 72, 14336, 64, batch=2048, tensor=2, stages=12, micro=2, precision="fp16", peak=63),
    _bloom("bloom-100-layers", 100, 12288, 64, batch=2048, tensor=8, stages=6, micro=4, peak=72),
    _bloom("bloom-176b", 70, 14336, 112, batch=2048, tensor=4, stages=12, micro=2, peak=59),
    # bigscience-workshop/bigscience, experiments/tr3m-1B3.md
    *(
        Run(f"tr3m-1b3-{name}", 24, 2048, 16, 512, 8, "V100-32", micro=micro, recomputed=recomputed, precision="fp16",
            vocabulary=50_304, peak=peak, seconds=seconds)
        for name, micro, recomputed, peak, seconds in (("recomputed", 8, True, 25, 28), ("kept", 1, False, 27, 23))
    ),
    _nanotron("nanotron-8b-tp8", 32, 4096, 32, 128, rest=FFN[8], tensor=8, micro=8, batch=256, peak=66.88),
    _nanotron("nanotron-70b", 80, 8192, 64, 64, rest=FFN[70], tensor=4, stages=16, peak=63.07),
    _nanotron("nanotron-8b-pp4", 32, 4096, 32, 8, rest=FFN[8], stages=4, peak=63.07),
    # InternLM/InternEvo doc/en/train_performance.md
    Run("internevo-7b-tp4", 32, 4096, 32, 4, 4, "A800", tensor=4, recomputed=True, vocabulary=103_168, rest=FFN[32],
        peak=61),
    Run("internevo-7b-zero3", 32, 4096, 32, 16, 4, "A800", 3, recomputed=True, vocabulary=103_168, rest=FFN[32],
        peak=56),
    # DeepSpeedExamples training/bf16_master_weight
    Run("deepspeed-7b", 32, 4096, 32, 4, 4, "H100", 3, recomputed=True, vocabulary=32_000, tokens=512, rest=FFN[32],
        peak=31.38, seconds=0.6016),
)  # fmt: skip
TIMES = (
    _foundry("foundry-13b-h100", 40, 5120, "H100", 16, 4792, micro=2),
    _foundry("foundry-7b-a100", 32, 4096, "A100-80", 96, 4641, micro=6),
    _foundry("foundry-3b-a100", 32, 2560, "A100-40", 320, 10065, micro=5),
    _foundry("foundry-125m-a100", 12, 768, "A100-40", 624, 136334, micro=26),
    _foundry("foundry-7b-32k-h100", 32, 4096, "H100", 32, 3318, micro=2, tokens=32768, recomputed=True),
    # NVIDIA/Megatron-LM at SC21 (arXiv 2104.04473) table 2; arXiv 2205.05198 table 5
    Run("megatron-22b", 48, 6144, 64, 4, 8, "A100-80", tensor=8, micro=4, recomputed=True, precision="fp16",
        seconds=1.42),
    Run("megatron-530b", 105, 20480, 128, 280, 280, "A100-80", tensor=8, stages=35, recomputed=True, precision="fp16",
        seconds=49.05),
    *(run for run in PEAKS if run.seconds),
    # not among the sources of the planner's ranges: bigscience's layouts of tr11
    _bloom("bloom-tp8-pp12", 72, 14336, 64, batch=2048, tensor=8, stages=12, micro=2, precision="fp16", seconds=134.02),
    _bloom("bloom-176b", 70, 14336, 112, batch=2048, tensor=4, stages=12, micro=2, seconds=104.5),
)  # fmt: skip
