"""Valid DeepSpeed configs: what they resolve to, and whether DeepSpeed accepts it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import hjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config.deepspeed import Layout, load
from megagpt.config.deepspeed.batch import BatchSplit, split_batch
from megagpt.config.deepspeed.view import ConfigView
from megagpt.config.recipe import load as load_recipe
from megagpt.config.syntax.hjson_reader import read_hjson
from megagpt.config.syntax.yaml_reader import ConfigTree
from megagpt.errors import UserError

ROOT = Path(__file__).parents[4]
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
RECIPES = sorted((ROOT / "launch/recipes").glob("*.yaml"))
SMALL = ROOT / "launch/recipes/gpt2-124m-openwebtext.yaml"
AUTO = (
    '"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"',
    '"optimizer": {"type": "auto", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}',
    '"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}}',
    '"gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}',
)
# configs that split the model: the ranks of one replica, and the ranks that its heads are divided among
DEGREES = {
    "pipeline2": {"ranks": 2},
    "pipeline4-zero1": {"ranks": 4},
    "tensor2": {"ranks": 2, "heads": 2},
    "3d": {"ranks": 4, "heads": 2},
    "ulysses2-zero3": {"ranks": 2, "heads": 2},
}


def deepspeed_accepts(config: dict, ranks: int, monkeypatch: pytest.MonkeyPatch):
    """Parse a config with DeepSpeed itself, as on one of several ranks."""
    from deepspeed.runtime import config as ds

    monkeypatch.setattr(ds.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ds.dist, "get_world_size", lambda: ranks)
    return ds.DeepSpeedConfig(config)


def autos(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(autos, value.values()))
    return value == "auto"


def test_auto_and_absent_are_equivalent(resolve):
    auto, absent = resolve(*AUTO).config, resolve().config
    assert auto == absent
    assert not autos(auto)
    assert auto == {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 16,  # 16 · 1,024 tokens are 16,384
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 0},
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def test_equal_values_in_both_files_are_allowed(resolve):
    stated = (
        '"train_batch_size": 64, "gradient_clipping": 1, "bf16": {"enabled": false}',
        '"optimizer": {"type": "adamw", "params": {"lr": 0.0006, "betas": [0.9, 0.95], "eps": 1e-8}}',
        '"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 6e-4, '
        '"warmup_num_steps": 10, "total_num_steps": 100, "warmup_type": "linear"}}',
    )
    assert resolve(*stated).config == resolve().config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_resolved_config_resolves_to_itself(path, known, tmp_path):
    recipe = load_recipe(SMALL)
    first = load(path, recipe, 8, known)
    (tmp_path / "deepspeed.json").write_text(json.dumps(first.config, indent=2))
    again = load(tmp_path / "deepspeed.json", recipe, 8, known)
    assert (again.config, again.layout) == (first.config, first.layout)


def test_recipe_owns_both_learning_rates_of_muon(resolve):
    overrides = ("optimizer.type=muon", "optimizer.muon_lr=0.02")
    stated = '"optimizer": {"type": "Muon", "params": {"adam_lr": 6e-4, "muon_lr": 0.02, "momentum": 0.95}}'
    assert resolve(stated, overrides=overrides).layout.zero_stage == 0
    with pytest.raises(UserError, match="two places set Muon's learning rate"):
        resolve(stated.replace("0.02", "0.03"), overrides=overrides)


def test_no_clipping_is_explicit_because_deepspeed_clips_at_1_by_default(resolve):
    assert resolve(overrides=("optimizer.clip=null",)).config["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("recipe", "stated", "precision"),
    [
        ("null", "{}", "fp32"),
        ("null", '{"enabled": "auto"}', "fp32"),
        ("null", '{"enabled": true}', "bf16"),
        ("null", '{"enabled": false}', "fp32"),
        ("bf16", '{"enabled": "auto"}', "bf16"),
        ("bf16", '{"enabled": true}', "bf16"),
        ("fp16", '{"enabled": false}', "fp16"),
    ],
)
def test_precision_is_that_of_the_recipe_else_of_the_deepspeed_config(resolve, recipe, stated, precision):
    resolved = resolve(f'"bf16": {stated}', overrides=(f"precision={recipe}",))
    assert resolved.recipe.precision == precision
    assert resolved.config["bf16"]["enabled"] == (precision == "bf16")
    assert resolved.config["fp16"]["enabled"] == (precision == "fp16")
    accumulation = resolved.config.get("data_types", {}).get("grad_accum_dtype")
    assert accumulation == ("fp32" if precision == "bf16" else None)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_at_stage_0_runs_at_stage_1_with_a_note(resolve, precision):
    resolved = resolve(overrides=(f"precision={precision}",))
    assert (resolved.layout.zero_stage, resolved.config["zero_optimization"]["stage"]) == (1, 1)
    why = "DeepSpeed's stage 0 starts with an Adam step on zero gradients"
    assert resolved.notes == (f"{precision} runs at ZeRO stage 1 instead of 0: {why}",)
    assert resolve('"zero_optimization": {"stage": 2}', overrides=(f"precision={precision}",)).notes == ()


def test_settings_that_change_the_numbers_are_noted(resolve):
    resolved = resolve(
        '"zero_optimization": {"stage": 3, "zero_quantized_gradients": true}', '"communication_data_type": "bf16"'
    )
    assert resolved.notes == (
        "zero_quantized_gradients quantizes: the loss curve differs from that of other layouts",
        "communication_data_type rounds gradients: the loss curve differs from that of other layouts",
    )


def test_layout_is_derived_from_the_config(resolve):
    resolved = resolve('"zero_optimization": {"stage": 3}', '"train_micro_batch_size_per_gpu": 4', ranks=8)
    assert resolved.layout == Layout(
        world_size=8, data_parallel=8, micro_batch=4, accumulation=2, zero_stage=3,
        pipeline_stages=1, tensor_parallel=1, sequence_parallel=1,
    )  # fmt: skip


def test_micro_batch_follows_from_a_given_accumulation(resolve):
    layout = resolve('"gradient_accumulation_steps": 4').layout
    assert (layout.micro_batch, layout.accumulation) == (8, 4)


def test_ranks_of_one_replica_read_the_same_data():
    layout = Layout(
        world_size=24, data_parallel=3, micro_batch=1, accumulation=1, zero_stage=1,
        pipeline_stages=2, tensor_parallel=2, sequence_parallel=2,
    )  # fmt: skip
    assert [layout.data_rank(rank) for rank in range(24)] == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 4 + [1] * 4 + [2] * 4


def test_layout_derives_its_numbers_and_describes_itself():
    layout = Layout(
        world_size=24, data_parallel=3, micro_batch=4, accumulation=5, zero_stage=1,
        pipeline_stages=2, tensor_parallel=2, sequence_parallel=2,
    )  # fmt: skip
    assert layout.zero_partitions == 6
    assert layout.pipeline_bubble == pytest.approx(1 / 6)  # 2 stages, 5 micro-batches: idle for 1 of 6 steps
    assert str(layout) == "24 ranks, 2 pipeline stages, tensor parallel 2, sequence parallel 2, ZeRO stage 1"
    assert layout.batch_product == "3 × 4 × 5"
    alone = Layout(world_size=1, data_parallel=1, micro_batch=1, accumulation=1, zero_stage=0)
    assert (str(alone), alone.parallelism, alone.pipeline_bubble) == ("1 rank, ZeRO stage 0", "", 0)


def test_layout_is_restored_from_the_manifest_of_an_old_checkpoint():
    record = {"world_size": 4, "zero_stage": 1, "pipeline_stages": 2, "tensor_parallel": 1, "since_removed": 7}
    assert str(Layout.from_record(record)) == "4 ranks, 2 pipeline stages, ZeRO stage 1"


@pytest.mark.parametrize(
    ("stages", "global_size", "micro"), [(2, 64, 8), (4, 64, 4), (2, 12, 1), (8, 8, 1), (2, 24, 3)]
)
def test_pipeline_gets_four_micro_batches_per_stage_if_possible(resolve, stages, global_size, micro):
    overrides = (f"batch.global_size={global_size}", "model.seq_len=128")
    layout = resolve(f'"pipeline": {{"stages": {stages}}}', ranks=stages, overrides=overrides).layout
    assert (layout.micro_batch, layout.accumulation) == (micro, global_size // micro)


@pytest.mark.parametrize(
    ("lines", "note"),
    [
        (
            '"pipeline": {"stages": 2}',
            "the pipeline runs at ZeRO stage 1 instead of 0: at 0 each pipeline stage clips by its own norm",
        ),
        (
            '"tensor_parallel": {"autotp_size": 2}',
            "tensor parallelism runs at ZeRO stage 1 instead of 0: at 0 each rank clips by its own norm",
        ),
    ],
)
def test_parallel_model_runs_at_stage_1_instead_of_0_with_a_note(resolve, lines, note):
    resolved = resolve(lines)
    assert (resolved.layout.zero_stage, resolved.config["zero_optimization"]["stage"]) == (1, 1)
    assert resolved.notes == (note,)


@settings(deadline=None)
@given(
    ranks=st.integers(1, 64),
    share=st.integers(1, 500),
    seq_len=st.integers(1, 40_000),
    extra=st.integers(0, 63),
)
def test_micro_batch_is_the_largest_that_divides_and_fits(ranks, share, seq_len, extra):
    recipe = load_recipe(SMALL, [f"batch.global_size={ranks * share + extra}", f"model.seq_len={seq_len}"])
    batch = split_batch(ConfigView(ConfigTree("d.json"), frozenset()), recipe, ranks)
    if (ranks * share + extra) % ranks:
        assert not isinstance(batch, BatchSplit)
        return
    share += extra // ranks
    assert isinstance(batch, BatchSplit)
    assert batch.micro * batch.accumulation == share
    assert batch.micro == 1 or batch.micro * seq_len <= 16_384
    assert not [m for m in range(batch.micro + 1, share + 1) if share % m == 0 and m * seq_len <= 16_384]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe_path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_resolves_with_every_config_or_fails_with_a_reason(recipe_path, path, ranks, known, monkeypatch):
    recipe = load_recipe(recipe_path)
    try:
        resolved = load(path, recipe, ranks, known)
    except UserError as error:
        cut = DEGREES.get(path.stem, {"ranks": 1})
        indivisible = ranks % cut["ranks"] != 0 or recipe.batch.global_size % (ranks // cut["ranks"]) != 0
        few_heads = recipe.model.n_kv_head % cut.get("heads", 1) != 0
        half_a_node = path.stem == "zeropp" and ranks % 8 != 0
        assert len(error.problems) == indivisible + few_heads + half_a_node  # noqa: PT017
        assert all(problem.where and problem.do for problem in error.problems)  # noqa: PT017
        return
    layout = resolved.layout
    accepted = deepspeed_accepts(resolved.config, layout.data_parallel * layout.sequence_parallel, monkeypatch)
    assert accepted.train_batch_size == recipe.batch.global_size
    assert accepted.zero_optimization_stage == resolved.layout.zero_stage
    assert accepted.gradient_clipping == recipe.optimizer.clip
    samples = (layout.micro_batch, layout.accumulation, layout.data_parallel)
    assert math.prod(samples) == recipe.batch.global_size
    assert layout.pipeline_stages * layout.tensor_parallel * layout.sequence_parallel * layout.data_parallel == ranks


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_is_short_and_names_purpose_and_cost(path):
    text = path.read_text(encoding="utf-8")
    head = text.partition("{")[0]
    assert len(text.splitlines()) <= 30
    assert "// For: " in head
    assert "// Costs: " in head
    assert not {"gpt2", "gpt3", "llama", "sotu", "cluster", "slurm"} & set(path.stem.replace("-", " ").split())
    stage = hjson.loads(text)["zero_optimization"]["stage"]
    named_otherwise = {**dict.fromkeys(DEGREES, 1), "small-gpu": 3, "zeropp": 3}
    assert f"zero{stage}" in path.stem or named_otherwise[path.stem] == stage


def test_file_is_parsed_as_deepspeed_parses_it(tmp_path):
    text = '// one\n# two\n{\n"a": 1, /* three\n*/ "b": {"c": [1, {"d": 5e8}], e: x y\n},\n  "f": 1e-4, "g": null\n}'
    (tmp_path / "d.json").write_text(text)
    tree = read_hjson(tmp_path / "d.json")
    assert tree.values == hjson.loads(text)  # the library that DeepSpeed calls
    lines = {key: int(place.at.rpartition(":")[2]) for key, place in tree.locations.items()}
    assert lines == {"a": 4, "b": 5, "b.c": 5, "b.c.1.d": 5, "b.e": 5, "f": 7, "g": 7}


def test_known_keys_are_those_of_deepspeed(known):
    keys = known["properties"]
    zero = keys["zero_optimization"]["properties"]
    # all from https://www.deepspeed.ai/docs/config-json/
    assert {"train_batch_size", "optimizer", "scheduler", "fp16", "bf16", "gradient_clipping", "aio"} <= set(keys)
    assert {"activation_checkpointing", "flops_profiler", "steps_per_print", "csv_monitor", "pipeline"} <= set(keys)
    assert {"stage", "overlap_comm", "stage3_max_live_parameters", "offload_param"} <= set(zero)
    assert "nvme_path" in zero["offload_param"]["properties"]
    assert zero["reduce_bucket_size"] == {"exclusiveMinimum": 0, "type": "integer"}
    assert keys["elasticity"]["removed"]
    assert zero["cpu_offload"]["deprecated"] == "offload_optimizer"
    assert "train_batch_sise" not in keys


def test_resolving_imports_neither_torch_nor_deepspeed(known, tmp_path):
    code = (
        "import json, sys, megagpt.config.deepspeed as d, megagpt.config.recipe as r\n"
        "d.load(sys.argv[1], r.load(sys.argv[2]), 1, json.load(open(sys.argv[3])))\n"
        "print({'torch', 'deepspeed'} & set(sys.modules))"
    )
    (tmp_path / "known.json").write_text(json.dumps(known))
    command = [sys.executable, "-c", code, ROOT / "ds_configs/zero1.json", SMALL, tmp_path / "known.json"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == "set()\n"


def test_text_of_an_override_is_used_as_it_is_and_paths_are_expanded(resolve, monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("SCRATCH", "/s")
    overrides = ("ds.csv_monitor.job_name=exp #3", "ds.csv_monitor.output_path=~/logs")
    config = resolve('"tensorboard": {"output_path": "$SCRATCH/tb"}', overrides=overrides).config
    assert config["csv_monitor"] == {"job_name": "exp #3", "output_path": "/h/logs"}
    assert config["tensorboard"] == {"output_path": "/s/tb"}
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(UserError, match="cannot be expanded: the environment variable SCRATCH"):
        resolve('"tensorboard": {"output_path": "$SCRATCH/tb"}')
