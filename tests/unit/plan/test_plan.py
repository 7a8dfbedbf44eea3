"""`megagpt plan` as a user runs it: its figures, its suggestions and its errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.cli import main
from megagpt.config.deepspeed.known_keys import recorded_keys
from megagpt.engine.deepspeed_keys import known_keys
from megagpt.errors import UserError
from megagpt.plan import PlanOptions, plan, search

ROOT = Path(__file__).parents[3]
# without those of 25 heads, which two tensor-parallel ranks cannot split
RECIPES = [path for path in sorted((ROOT / "launch/recipes").glob("*.yaml")) if "1.5b" not in path.stem]
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
SEVEN = ROOT / "launch/recipes/llama-7b-redpajama.yaml"
ONE_NODE = {"nodes": 1, "ranks_per_node": 8, "device": "H100"}


def config(name):
    return ROOT / f"ds_configs/{name}.json"


def test_the_stored_keys_are_those_of_deepspeed():
    """To update them: python -m megagpt.engine.deepspeed_keys > megagpt/config/deepspeed/known_keys.json"""
    assert recorded_keys() == json.loads(json.dumps(known_keys()))


def test_planning_loads_neither_torch_nor_deepspeed():
    arguments = ["plan", "--recipe", str(SEVEN), "--deepspeed_config", str(config("zero1")), "--world-size", "8"]
    arguments += ["--device", "H100"]  # does not fit, so that it searches for changes, too
    program = f"""
import sys
from megagpt.cli import main
code = main({arguments!r})
print(code, [name for name in ("torch", "deepspeed") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "1 []"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_can_be_planned_on_every_config(path):
    for recipe in RECIPES:
        ranks = 8 if path.stem in ("3d", "pipeline4-zero1", "zeropp") else 2
        made = plan(PlanOptions(recipe, path, world_size=ranks, device="A100-80", host_memory="1024GiB"))
        assert made.memory.device > 0
        assert made.length.updates is not None
        assert str(made).startswith("model    ")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("zero1", ONE_NODE),
        ("zero2", {"world_size": 16, "device": "A100-40"}),
        ("pipeline4-zero1", {"world_size": 8, "device": "V100-32"}),
    ],
)
def test_each_suggestion_makes_it_fit(name, options):
    before = plan(PlanOptions(SEVEN, config(name), **options))
    assert before.fit.is_bad
    assert before.changes
    for line in before.changes:
        after = plan(PlanOptions(SEVEN, config(name), tuple(line.split()), **options))
        assert after.fit.device == "fits"
        assert not after.changes


def test_nothing_is_suggested_if_it_fits():
    made = plan(PlanOptions(SEVEN, config("zero3"), ("ds.train_micro_batch_size_per_gpu=1",), **ONE_NODE))
    assert made.fit.device == "fits"
    assert made.changes == ()


def test_offload_moves_the_optimizer_to_the_host(capsys):
    near = plan(PlanOptions(SEVEN, config("zero2"), **ONE_NODE))
    away = plan(PlanOptions(SEVEN, config("zero2-offload"), **ONE_NODE, host_memory="64GiB"))
    assert away.memory.optimizer == 0 < near.memory.optimizer
    assert away.time is None is not near.time
    assert away.memory.pinned > 16 * 6_738_415_616 // 8  # master, moments, gradient
    assert away.fit.host == "does not fit"
    arguments = ["--nodes", "1", "--gpus-per-node", "8", "--host-memory", "64GiB"]
    assert main(["plan", "--recipe", str(SEVEN), "--deepspeed_config", str(config("zero2-offload")), *arguments]) == 1
    assert "64 available: does not fit" in capsys.readouterr().out


def test_a_folder_lists_the_configs_that_fit_with_the_overrides_they_need_best_first():
    options = {"nodes": 1, "ranks_per_node": 6, "device": "A100-80"}
    found = search(PlanOptions(SEVEN, ROOT / "ds_configs", ("batch.global_size=384",), **options))
    names = [one.config for one in found.choices]
    assert {*names, *found.others} == {path.stem for path in CONFIGS}
    assert names.index("zero3") < names.index("zero3-offload")  # needs no transfers to the host
    assert "cannot be divided into groups of 8" in found.others["zeropp"]  # groups of 8 among 6 ranks
    for one in found.choices:
        made = plan(
            PlanOptions(SEVEN, config(one.config), ("batch.global_size=384", *one.overrides.split()), **options)
        )
        assert made.fit.device == "fits"
    assert [one.order for one in found.choices] == sorted(one.order for one in found.choices)


def test_planning_a_folder_needs_configs_and_a_device(tmp_path):
    for folder, options, what in (
        (tmp_path, ONE_NODE, "contains no DeepSpeed config"),
        (ROOT / "ds_configs", {}, "for a device"),
    ):
        with pytest.raises(UserError, match=what):
            search(PlanOptions(SEVEN, folder, **options))


def test_json_contains_every_figure(capsys):
    arguments = ["--recipe", str(SEVEN), "--deepspeed_config", str(config("zero3")), "--world-size", "64"]
    assert main(["plan", *arguments, "--device", "H100", "length.tokens=4.0e10", "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 6_738_415_616
    assert found["length"]["updates"] == -(-40_000_000_000 // 2048**2)
    assert found["data_parallel"] * found["micro_batch"] * found["accumulation"] == found["global_batch"] == 2048


def test_the_length_of_an_epoch_is_that_of_the_corpus_if_it_exists(data, recipe):
    overrides = ("length={epochs: 2}",)
    made = plan(PlanOptions(recipe, config("zero1"), overrides))
    tokens = json.loads((data / "text.train.json").read_text())["tokens"]
    assert made.length.updates == -(-2 * (tokens // 32) // 4)
    gone = plan(PlanOptions(recipe, config("zero1"), (*overrides, "data.train=nowhere")))
    assert gone.length.updates is None
    assert "set length.tokens" in str(gone)


@pytest.mark.parametrize(
    ("options", "what", "do"),
    [
        ({"device": "H10"}, "H10 is neither a known device", "write H100"),
        ({"host_memory": "much"}, "much is neither a known device", "write one of"),
        ({"world_size": 7, "nodes": 2, "ranks_per_node": 4}, "the options contradict each other", "drop one of them"),
    ],
)
def test_an_invalid_machine_is_an_error(options, what, do):
    with pytest.raises(UserError) as caught:
        plan(PlanOptions(SEVEN, config("zero1"), **options))
    (problem,) = caught.value.problems
    assert what in problem.what
    assert do in problem.do
