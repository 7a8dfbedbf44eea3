"""Valid recipes: YAML scalars, defaults, overrides, source locations, and the length in updates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megagpt.config.recipe import ModelSection, Recipe, Source, load, to_yaml, total_updates
from megagpt.errors import UserError

RECIPES = sorted((Path(__file__).parents[4] / "launch/recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("6e-4", 6e-4), ("6.0e-4", 6e-4), ("6E-4", 6e-4), (".5e-3", 5e-4), ("1", 1.0), ("1_0.5", 10.5), ("+2.", 2.0)],
)
def test_float_notations_are_parsed_as_floats(loader, text, value):
    assert loader({6: f"optimizer: {{lr: {text}}}"}).optimizer.lr == value


@pytest.mark.parametrize(("text", "value"), [("600_000", 600_000), ("010", 10), ("300e9", 300 * 10**9)])
def test_integers_are_decimal(loader, text, value):
    assert loader({8: f"length: {{tokens: {text}}}"}).length.tokens == value


@pytest.mark.parametrize("text", ["12:30", "2024-01-01", "no", "on", "0x10", "1e5x", '"5"', "!!str 5"])
def test_text_that_yaml_1_1_would_convert_stays_text(loader, text):
    assert loader({1: f"run_dir: {text}"}).run_dir == text.split()[-1].strip('"')


def test_every_model_key_is_filled_in(loader):
    model = loader({3: "model: {preset: gpt2-124m, activation: swiglu}"}).model
    assert (model.n_layer, model.d_model, model.vocab_size) == (12, 768, 50257)  # the preset's
    assert (model.n_kv_head, model.d_ff) == (12, 2048)  # derived: 8/3 · 768
    assert model.activation == "swiglu"  # given in addition to the preset


@pytest.mark.parametrize(("d_model", "d_ff"), [(768, 2048), (4096, 10944), (64, 192), (100, 320)])
def test_default_width_of_swiglu_is_eight_thirds_rounded_up_to_64(d_model, d_ff):
    model = ModelSection(n_layer=1, n_head=1, d_model=d_model, vocab_size=9, seq_len=9, activation="swiglu")
    assert model.d_ff == d_ff
    assert 8 * d_model / 3 <= d_ff < 8 * d_model / 3 + 64


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("a", (Source(path="a"),)),
        ("[a, b]", (Source(path="a"), Source(path="b"))),
        ("[{path: a, weight: 3}, b]", (Source(path="a", weight=3.0), Source(path="b", weight=1.0))),
    ],
)
def test_training_data_may_be_a_single_prefix(loader, text, sources):
    assert loader({4: f"data: {{train: {text}}}"}).data.train == sources


def test_only_muon_has_a_momentum(loader):
    assert loader().optimizer.muon_momentum is None
    assert loader({6: "optimizer: {type: muon, lr: 1e-3, muon_lr: 0.02}"}).optimizer.muon_momentum == 0.95


def test_recipe_is_immutable(loader):
    with pytest.raises(ValueError, match="frozen"):
        loader().optimizer.lr = 1.0


def test_overrides_replace_and_add_values(loader):
    recipe = loader(
        None,
        "optimizer.lr=1e-3",
        "evaluation.every=5",
        "model.n_layer=2",
        "length={tokens: 65536000}",
        "ds.zero_optimization.stage=3",  # overrides the DeepSpeed config
        "optimizer.lr=2e-3",  # the last one wins
        "optimizer.clip=",
    )
    assert (recipe.optimizer.lr, recipe.optimizer.clip) == (2e-3, None)
    assert (recipe.evaluation.every, recipe.model.n_layer) == (5, 2)
    assert (recipe.length.updates, recipe.length.tokens) == (None, 65536000)
    assert [recipe.location(key) != "" for key in ("length.tokens", "length.updates")] == [True, False]


@pytest.mark.parametrize(
    "text",
    [
        "# Title",
        "@x",
        "Q: who",
        "1984",
        "true",
        "[1",
        "{",
        "- a",
        "exp #3",
        "a: b",
        "'tis",
        "*",
        "&a",
        "%",
        "`",
        "\ta",
        "a ",
    ],
)
def test_override_of_a_key_that_takes_text_is_used_as_it_is(loader, text):
    overrides = [f"evaluation.prompt={text}", "evaluation.every=5", "data.tokenizer=t.model"]
    assert loader(None, *overrides).evaluation.prompt == text
    assert loader(None, f"run_dir=runs/{text}").run_dir == f"runs/{text}"
    assert loader(None, f"data.train=data/{text}").data.train[0].path == f"data/{text}"
    assert loader(None, f"data.tokenizer=data/{text}").data.tokenizer == f"data/{text}"


def test_override_of_a_key_that_takes_text_may_be_yaml_text_or_null(loader):
    assert loader(None, "evaluation.prompt=null").evaluation.prompt is None
    assert loader(None, "evaluation.prompt=").evaluation.prompt is None
    assert loader(None, r'run_dir="null\u00e9"').run_dir == "null\u00e9"
    assert loader(None, "run_dir='it''s'").run_dir == "it's"
    assert [source.path for source in loader(None, "data.train=[a, b]").data.train] == ["a", "b"]


def test_home_and_variables_are_expanded_in_every_path(loader, monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("SCRATCH", "/s")
    recipe = loader({1: "run_dir: ~/x", 4: "data: {tokenizer: $SCRATCH/t, train: [~/a, {path: '${SCRATCH}/b'}]}"})
    assert (recipe.run_dir, recipe.data.tokenizer) == ("/h/x", "/s/t")
    assert [source.path for source in recipe.data.train] == ["/h/a", "/s/b"]
    recipe = loader(None, "run_dir=$SCRATCH/r", "data.validation=~/v", "init_from=~/r@latest")
    assert (recipe.run_dir, recipe.data.validation, recipe.init_from) == ("/s/r", ("/h/v",), "/h/r@latest")
    assert loader(None, "run_dir=runs/~x").run_dir == "runs/~x"


def test_path_that_cannot_be_expanded_is_an_error(loader, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(UserError) as caught:
        loader({4: "data: {train: [a, $NOT_SET/b]}"}, "run_dir=~nobody-here/x")
    assert str(caught.value) == (
        "megagpt: run_dir cannot be expanded: there is no home directory of ~nobody-here\n"
        "  command line  run_dir=~nobody-here/x\n  do: set it where training starts, or write the path out\n"
        "megagpt: data.train.1 cannot be expanded: the environment variable NOT_SET is not set\n"
        "  r.yaml:4  data.train.1\n  do: set it where training starts, or write the path out"
    )


def test_override_fixes_a_mistake_of_the_file(loader):
    assert loader({3: "model: {preset: gpt2-124m, n_layer: four}"}, "model.n_layer=4").model.n_layer == 4
    assert loader({5: "batch: 64"}, "batch.global_size=64").batch.global_size == 64


def test_source_locations_are_known(loader):
    recipe = loader({6: "optimizer:\n  eps: 1e-9\n  lr: 6.0e-4"}, "seed=5")
    assert recipe.location("optimizer.lr") == "r.yaml:8"
    assert recipe.location("seed") == "command line"
    assert recipe.location("model.n_layer") == recipe.location("optimizer.betas") == ""
    assert [recipe.location(key) != "" for key in ("optimizer.lr", "seed", "optimizer.betas")] == [True, True, False]


def test_resolved_recipe_has_every_key(loader):
    recipe = loader()
    values = yaml.safe_load(to_yaml(recipe))
    assert list(values) == list(Recipe.model_fields)
    assert list(values["model"]) == list(ModelSection.model_fields)
    assert values["model"]["d_ff"] == 3072


@pytest.mark.parametrize(
    ("length", "samples", "expected"),
    [
        ("updates: 100", 7, 100),
        ("tokens: 65536", 7, 1),  # exactly one update of 64 samples of 1,024 tokens
        ("tokens: 65537", 7, 2),
        ("epochs: 1", 640, 10),
        ("epochs: 1", 641, 11),
        ("epochs: 0.5", 6400, 50),
        ("epochs: 0.7", 640, 7),
        ("epochs: 1.1", 640, 11),  # in binary 1.1 · 640 is a little more than 704
    ],
)
def test_length_is_rounded_up_to_whole_updates(loader, length, samples, expected):
    recipe = loader({7: "schedule: {warmup_updates: 0}", 8: f"length: {{{length}}}"})
    assert total_updates(recipe, samples) == expected


def test_schedule_longer_than_training_is_an_error(loader):
    schedule = "schedule: {type: wsd, warmup_updates: 5, decay_updates: 6}"
    recipe = loader({7: schedule, 8: "length: {epochs: 1}"})
    assert total_updates(recipe, 640 + 64) == 11
    with pytest.raises(UserError) as caught:
        total_updates(recipe, 640)
    assert str(caught.value) == (
        "megagpt: warm-up and decay together are longer than the 10 updates of training\n"
        "  length.epochs            1.0   r.yaml:8\n  schedule.warmup_updates  5     r.yaml:7\n"
        "  schedule.decay_updates   6     r.yaml:7\n  do: shorten one of them, or train longer"
    )


def test_loading_a_recipe_does_not_import_torch():
    code = (
        "import sys, megagpt.config.recipe as r; r.load(sys.argv[1]); print({'torch', 'deepspeed'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code, RECIPES[0]], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_recipe_has_few_keys_and_each_has_a_help_text():
    sections = {name: info.annotation for name, info in Recipe.model_fields.items()}
    keys = {name: section.model_fields for name, section in sections.items() if hasattr(section, "model_fields")}
    top = {name: info for name, info in Recipe.model_fields.items() if name not in keys}
    # deliberately exact: whoever adds a key must raise a number here
    assert {name: len(fields) for name, fields in keys.items()} == {
        "model": 17,
        "data": 7,
        "batch": 1,
        "optimizer": 8,
        "schedule": 4,
        "length": 3,
        "evaluation": 3,
        "checkpoint": 4,
        "health": 5,
        "log": 2,
    }
    assert len(top) == 4
    for fields in (top, *keys.values()):
        assert not [name for name, info in fields.items() if not info.description]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_is_short_and_names_its_sources(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert text.startswith("#")
    assert load(path).run_dir == f"runs/{path.stem}"
    if path.stem != "quickstart":
        family, size, corpus = path.stem.split("-", 2)
        assert load(path).model.preset == f"{family}-{size}"
        assert corpus in str(load(path).data.train)
        assert "Numbers:" in text
    assert not set(path.stem.split("-")) & {"zero1", "zero2", "zero3", "offload", "pipeline", "cluster", "slurm"}


def test_unknown_preset_does_not_hide_other_mistakes(loader):
    with pytest.raises(UserError) as caught:
        loader({3: "model: {preset: nothing-like-it, n_layer: 0}"})
    assert [problem.what for problem in caught.value.problems] == [
        "model.n_layer cannot be 0",
        'there is no preset "nothing-like-it"',
    ]
