"""Mistakes in a DeepSpeed config: each row has its lines and the complete error message."""

from __future__ import annotations

from pathlib import Path

import pytest

from megagpt.config.deepspeed import load
from megagpt.config.recipe import load as load_recipe
from megagpt.errors import UserError

KEYS = {
    "unknown key, near a known one": (
        ['"gradient_clipp1ng": 1.0'],
        "megagpt: unknown key gradient_clipp1ng\n  d.json:2  gradient_clipp1ng\n  do: write gradient_clipping",
    ),
    "unknown key in a section": (
        ['"zero_optimization": {\n"stage": 2,\n"overlap_com": true}'],
        "megagpt: unknown key zero_optimization.overlap_com\n  d.json:4  zero_optimization.overlap_com\n"
        "  do: write zero_optimization.overlap_comm",
    ),
    "unknown key two levels down": (
        ['"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}'],
        "megagpt: unknown key zero_optimization.offload_param.devise\n"
        "  d.json:2  zero_optimization.offload_param.devise\n  do: write zero_optimization.offload_param.device",
    ),
    "unknown key, near none": (
        ['"aio": {"zzz": 1}'],
        "megagpt: unknown key aio.zzz\n  d.json:2  aio.zzz\n  do: remove it: DeepSpeed has no such key in aio",
    ),
    "unknown key that only looks like a model's": (
        ['"activation_checkpointing_": true'],
        "megagpt: unknown key activation_checkpointing_\n  d.json:2  activation_checkpointing_\n"
        "  do: write activation_checkpointing",
    ),
    "key of another section": (
        ['"offload_optimizer": {"device": "cpu"}'],
        "megagpt: misplaced key offload_optimizer: offload_optimizer belongs to zero_optimization\n"
        "  d.json:2  offload_optimizer\n  do: move it to zero_optimization.offload_optimizer",
    ),
    "removed from DeepSpeed": (
        ['"elasticity": {"enabled": true}', '"zero_optimization": {"mics_shard_size": 2}'],
        "megagpt: DeepSpeed has removed elasticity\n  d.json:2  elasticity\n  do: remove it\n"
        "megagpt: DeepSpeed has removed zero_optimization.mics_shard_size\n"
        "  d.json:3  zero_optimization.mics_shard_size\n  do: remove it",
    ),
    "deprecated": (
        ['"zero_optimization": {"stage": 2, "cpu_offload": true}'],
        "megagpt: zero_optimization.cpu_offload is deprecated\n  d.json:2  zero_optimization.cpu_offload\n"
        "  do: write offload_optimizer",
    ),
    "an old name": (
        ['"bfloat16": {"enabled": true}'],
        "megagpt: bfloat16 is deprecated\n  d.json:2  bfloat16\n  do: write bf16",
    ),
    "wrong type": (
        ['"zero_optimization": {"stage": 2, "overlap_comm": "yes"}'],
        'megagpt: zero_optimization.overlap_comm cannot be "yes"\n  d.json:2  zero_optimization.overlap_comm\n'
        "  do: give true or false, or null",
    ),
    "a stage that does not exist": (
        ['"zero_optimization": {"stage": 4, "offload_param": {"device": "cpu"}}'],
        "megagpt: zero_optimization.stage cannot be 4\n  d.json:2  zero_optimization.stage\n  do: give 0, 1, 2 or 3",
    ),
    "out of range": (
        ['"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}', '"gradient_accumulation_steps": 0'],
        "megagpt: zero_optimization.reduce_bucket_size cannot be 0\n  d.json:2  zero_optimization.reduce_bucket_size\n"
        "  do: give a whole number, above 0\n"
        "megagpt: gradient_accumulation_steps cannot be 0\n  d.json:3  gradient_accumulation_steps\n"
        "  do: give a whole number, at least 1",
    ),
    "the old form of a section": (
        ['"zero_optimization": true'],
        "megagpt: zero_optimization cannot be true\n  d.json:2  zero_optimization\n"
        "  do: give keys and values in braces",
    ),
    "a stray auto": (
        ['"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}'],
        'megagpt: zero_optimization.reduce_bucket_size is "auto", but megagpt does not fill it in\n'
        "  d.json:2  zero_optimization.reduce_bucket_size\n"
        "  do: write a value, or remove the key for DeepSpeed's default",
    ),
    "a key twice": (
        ['"zero_optimization": {"stage": 1}', '"zero_optimization": {}'],
        "megagpt: zero_optimization is given twice\n  d.json:2  zero_optimization\n  d.json:3  zero_optimization\n"
        "  do: keep one of the two",
    ),
    "a dotted key": (
        ['"zero_optimization.stage": 1'],
        'megagpt: "zero_optimization.stage" is not a key\n  d.json:2\n  do: write keys inside their section',
    ),
}

OWNERS = {
    "learning rate": (
        ['"optimizer": {"type": "AdamW", "params": {\n"lr": 1e-4}}'],
        "megagpt: two places set the learning rate\n"
        "  optimizer.lr         6.0e-4   r.yaml:6\n"
        "  optimizer.params.lr  1.0e-4   d.json:3\n"
        '  do: write "auto" in d.json (the recipe owns it)',
    ),
    "betas, against a default": (
        ['"optimizer": {"params": {"betas": [0.9, 0.999]}}'],
        "megagpt: the recipe owns the betas, and its default is another\n"
        "  optimizer.betas         [0.9, 0.95]    default\n"
        "  optimizer.params.betas  [0.9, 0.999]   d.json:2\n"
        '  do: write "auto" in d.json to use the default, or set optimizer.betas to [0.9, 0.999] in the recipe',
    ),
    "optimizer": (
        ['"optimizer": {"type": "Lion"}'],
        "megagpt: two places set the optimizer\n"
        '  optimizer.type  "adamw"   default\n  optimizer.type  "Lion"    d.json:2\n'
        '  do: write "auto" in d.json (the recipe owns it)',
    ),
    "clipping": (
        ['"gradient_clipping": 0.5'],
        "megagpt: the recipe owns the clipping norm, and its default is another\n"
        "  optimizer.clip     1.0   default\n  gradient_clipping  0.5   d.json:2\n"
        '  do: write "auto" in d.json to use the default, or set optimizer.clip to 0.5 in the recipe',
    ),
    "global batch": (
        ['"train_batch_size": 32'],
        "megagpt: two places set the global batch\n"
        "  batch.global_size  64   r.yaml:5\n  train_batch_size   32   d.json:2\n"
        '  do: write "auto" in d.json (the recipe owns it)',
    ),
    "precision": (
        ['"bf16": {"enabled": true}'],
        "megagpt: two places set the precision\n"
        '  precision     "fp32"   r.yaml:3\n  bf16.enabled  true     d.json:2\n'
        '  do: write "auto" in d.json (the recipe owns it)',
    ),
    "schedule": (
        ['"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20, "total_num_steps": 100}}'],
        "megagpt: two places set the schedule\n"
        '  schedule.type   "warmup_decay"   default\n  scheduler.type  "WarmupLR"       d.json:2\n'
        '  do: write "auto" in d.json (the recipe owns it)\n'
        "megagpt: two places set the warm-up\n"
        "  schedule.warmup_updates            10   r.yaml:7\n  scheduler.params.warmup_num_steps  20   d.json:2\n"
        '  do: write "auto" in d.json (the recipe owns it)',
    ),
    "form of the warm-up": (
        ['"scheduler": {"params": {"warmup_type": "log"}}'],
        "megagpt: two places set the form of the warm-up\n"
        '  schedule.warmup_updates       10      r.yaml:7\n  scheduler.params.warmup_type  "log"   d.json:2\n'
        '  do: write "auto" in d.json (the recipe owns it)',
    ),
    "a parameter that would be ignored": (
        ['"optimizer": {"legacy_fusion": true, "params": {"torch_adam": true, "betaz": 1}}'],
        "megagpt: optimizer.params.torch_adam would be ignored: megagpt builds the optimizer itself\n"
        "  d.json:2  optimizer.params.torch_adam\n  do: remove it\n"
        "megagpt: optimizer.params.betaz would be ignored: megagpt builds the optimizer itself\n"
        "  d.json:2  optimizer.params.betaz\n  do: write betas\n"
        "megagpt: optimizer.legacy_fusion would be ignored: megagpt builds the optimizer itself\n"
        "  d.json:2  optimizer.legacy_fusion\n  do: remove it",
    ),
}


@pytest.mark.parametrize(("lines", "message"), KEYS.values(), ids=KEYS)
def test_keys_are_checked_against_those_of_deepspeed(expect_error, lines, message):
    expect_error(lines, message)


@pytest.mark.parametrize(("lines", "message"), OWNERS.values(), ids=OWNERS)
def test_value_set_in_two_places_is_an_error_that_shows_both(expect_error, lines, message):
    expect_error(lines, message)


OVERRIDES = {
    "unknown key": (
        ("ds.zero_optimization.stag=3",),
        "megagpt: unknown key zero_optimization.stag\n  command line  ds.zero_optimization.stag=3\n"
        "  do: write zero_optimization.stage",
    ),
    "no value": (("ds.zero1",), 'megagpt: "ds.zero1" is not key=value\n  command line\n  do: write ds.KEY=VALUE'),
    "a second owner": (
        ("ds.optimizer.params.lr=1e-4",),
        "megagpt: two places set the learning rate\n  optimizer.lr         6.0e-4   r.yaml:6\n"
        "  optimizer.params.lr  1.0e-4   command line\n  do: use optimizer.lr=VALUE (the recipe owns it)",
    ),
    "a scheduler for wsd, which DeepSpeed has not": (
        ("schedule.type=wsd", "schedule.decay_updates=5", "ds.scheduler.type=WarmupDecayLR"),
        'megagpt: two places set the schedule\n  schedule.type   "wsd"             command line\n'
        '  scheduler.type  "WarmupDecayLR"   command line\n  do: use schedule.type=VALUE (the recipe owns it)',
    ),
    "updates for a length in tokens": (
        ("length={tokens: 1e9}", "ds.scheduler.params.total_num_steps=100"),
        "megagpt: two places set the length of training\n"
        "  length.tokens                     1000000000   command line\n"
        "  scheduler.params.total_num_steps  100          command line\n"
        "  do: use length.tokens=VALUE (the recipe owns it)",
    ),
    "another accumulation dtype": (
        ("precision=bf16", "ds.data_types.grad_accum_dtype=bf16"),
        "megagpt: data_types.grad_accum_dtype is not supported: gradients accumulate in fp32\n"
        '  command line  ds.data_types.grad_accum_dtype=bf16\n  do: write "auto"',
    ),
}


@pytest.mark.parametrize(("overrides", "message"), OVERRIDES.values(), ids=OVERRIDES)
def test_mistake_on_the_command_line_is_reported(expect_error, overrides, message):
    expect_error([], message, overrides=overrides)


def test_all_mistakes_are_reported_at_once(resolve):
    with pytest.raises(UserError) as caught:
        resolve('"gradient_clipping": 2', '"nope_nope": 1', '"bf16": {"enabled": true}', ranks=3)
    assert [problem.what for problem in caught.value.problems] == [
        "unknown key nope_nope",
        "two places set the precision",
        "the recipe owns the clipping norm, and its default is another",
        "the global batch is not divisible by the number of data-parallel ranks",
    ]


def test_invalid_json_files_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resolve, known):
    resolve()
    recipe = load_recipe("r.yaml")
    texts = {
        "[1]": "megagpt: d.json has no keys and values\n  d.json\n  do: see ds_configs for examples",
        '{"a":\n': "megagpt: d.json is not valid JSON: Expecting value\n  d.json:2\n  do: fix that line",
        '{"a": 1 /* x': "megagpt: d.json ends inside a comment\n  d.json\n  do: close it with */",
    }
    for text, message in texts.items():
        Path("d.json").write_text(text)
        with pytest.raises(UserError) as caught:
            load("d.json", recipe, 1, known)
        assert str(caught.value) == message
    with pytest.raises(UserError, match=r"cannot read none\.json"):
        load("none.json", recipe, 1, known)
