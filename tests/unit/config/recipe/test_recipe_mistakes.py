"""Mistakes in a recipe: each row has the edit that makes one and the complete error message."""

from __future__ import annotations

from pathlib import Path

import pytest

from megagpt.config import deepspeed
from megagpt.config.recipe import PRESETS, load, synonyms
from megagpt.config.recipe.checking import known_keys
from megagpt.errors import UserError

MISTAKES = {
    "unknown key, near a known one": (
        {3: "model: {preset: gpt2-124m, n_layers: 4}"},
        "megagpt: unknown key model.n_layers\n  r.yaml:3  model.n_layers\n  do: write model.n_layer",
    ),
    "unknown key, near none": (
        {5: "batch: {global_size: 64, zzz: 1}"},
        "megagpt: unknown key batch.zzz\n  r.yaml:5  batch.zzz\n  do: remove it; batch has global_size",
    ),
    "unknown section": (
        {6: "optimiser: {lr: 1e-3}"},
        "megagpt: unknown key optimiser\n  r.yaml:6  optimiser\n  do: write optimizer",
    ),
    "key of another section": (
        {7: "schedule: {warmup_updates: 10, lr: 1e-3}"},
        "megagpt: misplaced key schedule.lr: lr belongs to optimizer\n"
        "  r.yaml:7  schedule.lr\n  do: move it to optimizer.lr",
    ),
    "key of several sections": (
        {5: "batch: {global_size: 64, every: 5}"},
        "megagpt: misplaced key batch.every: every belongs to evaluation, checkpoint or log\n"
        "  r.yaml:5  batch.every\n  do: move it to evaluation.every, checkpoint.every or log.every",
    ),
    "dotted key in the file": (
        {6: "optimizer: {lr: 6.0e-4, a.b: 1}"},
        'megagpt: "a.b" is not a key\n  r.yaml:6\n  do: write keys inside their section',
    ),
    "wrong type": (
        {3: "model: {preset: gpt2-124m, n_layer: four}"},
        'megagpt: model.n_layer cannot be "four"\n  r.yaml:3  model.n_layer\n'
        "  do: give a whole number, at least 1: number of transformer blocks",
    ),
    "a truth value where a number is wanted": (
        {5: "batch: {global_size: true}"},
        "megagpt: batch.global_size cannot be true\n  r.yaml:5  batch.global_size\n"
        "  do: give a whole number, at least 1: samples per update, over all ranks",
    ),
    "a fraction where a whole number is wanted": (
        {8: "length: {tokens: 1.5}"},
        "megagpt: length.tokens cannot be 1.5\n  r.yaml:8  length.tokens\n"
        "  do: give a whole number, at least 1, or null: number of tokens, rounded up to whole updates",
    ),
    "yes is text, not true": (
        {3: "model: {preset: gpt2-124m, tie_embeddings: yes}"},
        'megagpt: model.tie_embeddings cannot be "yes"\n  r.yaml:3  model.tie_embeddings\n'
        "  do: give true or false: use the embedding matrix as the output head",
    ),
    "out of range": (
        {6: "optimizer: {lr: -1.0e-8}"},
        "megagpt: optimizer.lr cannot be -1.0e-8\n  r.yaml:6  optimizer.lr\n  do: give a number, above 0: "
        "peak learning rate of AdamW; with muon, that of embeddings, head and norms",
    ),
    "infinite": (
        {6: "optimizer: {lr: .inf}"},
        "megagpt: optimizer.lr cannot be Infinity\n  r.yaml:6  optimizer.lr\n  do: give a number, above 0: "
        "peak learning rate of AdamW; with muon, that of embeddings, head and norms",
    ),
    "not one of the allowed values": (
        {2: "precision: fp8"},
        'megagpt: precision cannot be "fp8"\n  r.yaml:2  precision\n  do: give fp32, bf16 or fp16, or null: '
        "precision of weights and activations in training; null: as the DeepSpeed config states, else fp32",
    ),
    "too short a list": (
        {6: "optimizer: {lr: 1e-3, betas: [0.9]}"},
        "megagpt: optimizer.betas cannot be [0.9]\n  r.yaml:6  optimizer.betas\n"
        "  do: give a list of 2 numbers: decay rates of AdamW's two moments",
    ),
    "out of range in a list": (
        {6: "optimizer: {lr: 1e-3, betas: [0.9, 1.0]}"},
        "megagpt: optimizer.betas.1 cannot be 1.0\n  r.yaml:6  optimizer.betas.1\n"
        "  do: give a number, at least 0 and below 1",
    ),
    "missing key": (
        {6: "optimizer: {eps: 1e-8}"},
        "megagpt: optimizer.lr is missing\n  r.yaml:6  optimizer.lr\n  do: give a number, above 0: "
        "peak learning rate of AdamW; with muon, that of embeddings, head and norms",
    ),
    "missing section": (
        {5: ""},
        "megagpt: batch is missing\n  r.yaml  batch\n  do: give a section with global_size",
    ),
    "empty section": (
        {5: "batch:"},
        "megagpt: batch cannot be null\n  r.yaml:5  batch\n  do: give a section with global_size",
    ),
    "mistakes inside a blend": (
        {4: "data: {train: [{path: a, wieght: 2}, {weight: 1}]}"},
        "megagpt: unknown key data.train.0.wieght\n  r.yaml:4  data.train.0.wieght\n"
        "  do: write data.train.0.weight\n"
        "megagpt: data.train.1.path is missing\n  r.yaml:4  data.train.1.path\n"
        "  do: give text, not empty: prefix of a corpus: its path without .bin or .idx",
    ),
    "empty blend": (
        {4: "data: {train: []}"},
        "megagpt: data.train is an empty list\n  r.yaml:4  data.train\n  do: give at least one prefix",
    ),
    "file for a prefix": (
        {4: "data: {train: data/x.train.bin}"},
        'megagpt: "data/x.train.bin" is a file, not a prefix\n  r.yaml:4  data.train\n  do: write data/x.train',
    ),
    "trained on what it is validated with": (
        {4: "data: {train: a, validation: a}"},
        'megagpt: data.validation is also in data.train\n  data.train       "a"   r.yaml:4\n'
        '  data.validation  "a"   r.yaml:4\n  do: give it a prefix of its own',
    ),
    "one of several validated on what it is trained with": (
        {4: "data: {train: [a, b], validation: [c, b]}"},
        'megagpt: data.validation is also in data.train\n  data.train       ["a", "b"]   r.yaml:4\n'
        '  data.validation  ["c", "b"]   r.yaml:4\n  do: give it a prefix of its own',
    ),
    "skip backwards": (
        {4: "data: {train: a, skip: [[3, 9], [8, 7]]}"},
        "megagpt: data.skip has a range that ends before it begins: [8, 7]\n  r.yaml:4  data.skip\n"
        "  do: write [first, last]",
    ),
    "unknown preset, near a known one": (
        {3: "model: {preset: gpt2-124}"},
        'megagpt: there is no preset "gpt2-124"\n  r.yaml:3  model.preset\n  do: write gpt2-124m',
    ),
    "unknown preset, near none": (
        {3: "model: {preset: zzz}"},
        'megagpt: there is no preset "zzz"\n  r.yaml:3  model.preset\n  do: choose one of quickstart, gpt2-124m, '
        "gpt2-355m, gpt2-774m, gpt2-1.5b, gpt3-2.7b, gpt3-6.7b, gpt3-13b, gpt3-175b, llama-1b, llama-7b, llama-70b",
    ),
}


@pytest.mark.parametrize(("lines", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_reported_with_location_and_fix(loader, lines, message):
    with pytest.raises(UserError) as caught:
        loader(lines)
    assert str(caught.value) == message


ADDED = {
    "a key twice": (
        "seed: 1\nseed: 2\n",
        "megagpt: seed is given twice\n  r.yaml:9  seed\n  r.yaml:10  seed\n  do: keep one of the two",
    ),
    "validation without data": (
        "evaluation: {every: 5}\n",
        "megagpt: evaluation.every needs data.validation\n  r.yaml:9  evaluation.every\n"
        "  do: give data.validation, or set evaluation.every to null",
    ),
    "a prompt without a tokenizer": (
        "evaluation: {prompt: Hello}\n",
        "megagpt: evaluation.prompt needs evaluation.every\n  r.yaml:9  evaluation.prompt\n"
        "  do: give evaluation.every, or set evaluation.prompt to null",
    ),
    "an alias": (
        "seed: *other\n",
        "megagpt: r.yaml is not valid YAML: aliases (*name) are not used here\n  r.yaml:9\n  do: fix that line",
    ),
    "a foreign tag": (
        "seed: !!python/name:os.system\n",
        "megagpt: r.yaml is not valid YAML: unknown tag tag:yaml.org,2002:python/name:os.system\n"
        "  r.yaml:9\n  do: fix that line",
    ),
    "a key that is not a scalar": (
        "? [a]\n: 1\n",
        "megagpt: r.yaml is not valid YAML: a key must be one word\n  r.yaml:9\n  do: fix that line",
    ),
    "broken YAML": (
        "log: {every: 5\n",
        "megagpt: r.yaml is not valid YAML: expected ',' or '}', but got '<stream end>'\n"
        "  r.yaml:10\n  do: fix that line",
    ),
}


@pytest.mark.parametrize(("add", "message"), ADDED.values(), ids=ADDED)
def test_mistake_in_an_added_line_is_reported(loader, add, message):
    with pytest.raises(UserError) as caught:
        loader({4: "data: {train: data/x.train}"}, add=add)
    assert str(caught.value) == message


OVERRIDES = {
    "unknown key": (
        "model.dmodel=4",
        "megagpt: unknown key model.dmodel\n  command line  model.dmodel=4\n  do: write model.d_model",
    ),
    "wrong type": (
        "optimizer.lr=fast",
        'megagpt: optimizer.lr cannot be "fast"\n  command line  optimizer.lr=fast\n  do: give a number, above 0: '
        "peak learning rate of AdamW; with muon, that of embeddings, head and norms",
    ),
    "no value": (
        "optimizer.lr",
        'megagpt: "optimizer.lr" is not key=value\n  command line\n  do: write KEY=VALUE',
    ),
    "no key": ("=5", 'megagpt: "=5" is not key=value\n  command line\n  do: write KEY=VALUE'),
    "broken value": (
        "log.every=[1",
        "megagpt: the value of log.every is not valid YAML: expected ',' or ']', but got '<stream end>'\n"
        "  command line  log.every=[1\n  do: put it in quotes",
    ),
    "a mistake between keys": (
        "model.n_head=7",
        "megagpt: model.d_model is not a multiple of model.n_head\n  model.d_model  768   preset gpt2-124m\n"
        "  model.n_head   7     command line\n  do: set model.d_model to 763 or 770",
    ),
}


@pytest.mark.parametrize(("override", "message"), OVERRIDES.values(), ids=OVERRIDES)
def test_mistake_on_the_command_line_is_reported(loader, override, message):
    with pytest.raises(UserError) as caught:
        loader(None, override)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("override", "do"),
    [
        ("optimizer.learning_rate=1", "write optimizer.lr"),
        ("model.max_position_embeddings=1", "write model.seq_len"),
        ("model.num-hidden-layers=1", "write model.n_layer"),
        ("hidden_size=1", "write model.d_model"),
        ("max_iters=1", "write length.updates"),
        ("model.untie_embeddings_and_output_weights=true", "write model.tie_embeddings, which means the opposite"),
        (
            "tensor_model_parallel_size=2",
            "set tensor_parallel.autotp_size in the DeepSpeed config, "
            "or ds.tensor_parallel.autotp_size=VALUE on the command line",
        ),
        ("modle.n_layer=3", "write model.n_layer"),
        ("optimizer.lrr=1", "write optimizer.lr"),
        ("zzz=1", "remove it; a recipe has run_dir, init_from, seed, precision, model, data, batch, optimizer, "
         "schedule, length, evaluation, checkpoint, health and log"),
        ("model.preset=gpt2", "choose one of gpt2-124m, gpt2-355m, gpt2-774m, gpt2-1.5b"),
        ("model.preset=openai-community/gpt2-xl", "write gpt2-1.5b"),
    ],
)  # fmt: skip
def test_remedy_names_the_key_that_is_meant_or_none(loader, override, do):
    with pytest.raises(UserError) as caught:
        loader(None, override)
    (problem,) = caught.value.problems
    assert (problem.where, problem.do) == (f"command line  {override}", do)


def test_every_synonym_leads_to_a_key_that_exists():
    for ours in set(synonyms._RECIPE_KEYS.values()) | set(synonyms._OPPOSITE.values()):
        assert ours in set(known_keys())
    assert not set(synonyms._RECIPE_KEYS) & {name.rpartition(".")[2].replace("_", "") for name in known_keys()}
    assert set(synonyms._PRESETS.values()) <= set(PRESETS)


def test_a_prompt_needs_a_tokenizer(loader):
    with pytest.raises(UserError) as caught:
        loader(add="evaluation: {every: 5, prompt: Hello}\n")
    assert str(caught.value) == (
        'megagpt: evaluation.prompt needs data.tokenizer\n  evaluation.prompt  "Hello"   r.yaml:9\n'
        "  evaluation.every   5         r.yaml:9\n  do: give data.tokenizer, or set evaluation.prompt to null"
    )


def test_all_mistakes_are_reported_at_once(loader):
    with pytest.raises(UserError) as caught:
        loader(
            {
                1: "run_dir: 5",
                3: "model: {preset: gpt2-124m, n_kv_head: 5, foo_bar: 1}",
                5: "batch: {}",
                8: "length: {updates: 5}",
            },
            "optimizer.lr=fast",
            "nonsense",
        )
    assert [problem.what for problem in caught.value.problems] == [
        '"nonsense" is not key=value',
        "unknown key model.foo_bar",
        "run_dir cannot be 5",
        "batch.global_size is missing",
        'optimizer.lr cannot be "fast"',
        "model.n_head is not a multiple of model.n_kv_head",
        "schedule.warmup_updates is not less than the length of 5 updates",
    ]


def test_unreadable_files_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("- 1\n")
    Path("empty.yaml").write_text("")
    Path("binary.yaml").write_bytes(b"a: \xff")
    Path("control.yaml").write_bytes(b"a: \x01")
    messages = {
        "none.yaml": "megagpt: cannot read none.yaml: No such file or directory\n  do: check the path",
        "list.yaml": "megagpt: list.yaml has no keys and values\n  list.yaml\n  do: see launch/recipes for examples",
        "empty.yaml": "megagpt: empty.yaml has no keys and values\n  empty.yaml\n  do: see launch/recipes for examples",
        "binary.yaml": "megagpt: binary.yaml is not UTF-8 text\n  byte 3\n  do: save it as UTF-8",
        "control.yaml": "megagpt: control.yaml is not valid YAML: special characters are not allowed\n"
        "  control.yaml\n  do: fix that line",
    }
    for name, message in messages.items():
        with pytest.raises(UserError) as caught:
            load(name)
        assert str(caught.value) == message


def test_recipe_and_deepspeed_config_swapped_is_an_error(loader, tmp_path):
    config = tmp_path / "zero2.json"
    config.write_text('// purpose\n{"zero_optimization": {"stage": 2}}')
    with pytest.raises(UserError, match="this is a DeepSpeed config, not a recipe"):
        load(config)
    recipe = loader()
    with pytest.raises(UserError, match="this is a YAML file, not a DeepSpeed config"):
        deepspeed.load("r.yaml", recipe, 1, {"properties": {}})
