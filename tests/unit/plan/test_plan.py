"""`megagpt plan`, as a user types it: what it says, what it suggests, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.cli import main
from megagpt.config.deepspeed.known_keys import recorded_keys
from megagpt.engine.deepspeed_keys import known_keys
from megagpt.errors import UserError
from megagpt.plan import Options, plan, search

ROOT = Path(__file__).parents[3]
# those that every config can train: 25 heads are not cut by two
RECIPES = [path for path in sorted((ROOT / "launch/recipes").glob("*.yaml")) if "1.5b" not in path.stem]
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
SEVEN = ROOT / "launch/recipes/llama-7b-redpajama.yaml"
ONE_NODE = {"nodes": 1, "ranks_per_node": 8, "device": "H100"}


def config(name):
    return ROOT / f"ds_configs/{name}.json"


def test_the_keys_written_down_are_deepspeeds():
    """If not: megagpt deepspeed-keys > megagpt/config/deepspeed/known_keys.json"""
    assert recorded_keys() == json.loads(json.dumps(known_keys()))


def test_a_plan_is_made_without_torch_and_deepspeed():
    words = ["plan", "--recipe", str(SEVEN), "--deepspeed_config", str(config("zero1")), "--world-size", "8"]
    words += ["--device", "H100"]  # does not fit, so that changes are looked for too
    program = f"""
import sys
from megagpt.cli import main
code = main({words!r})
print(code, [name for name in ("torch", "deepspeed") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "1 []"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_can_be_planned_on_every_config(path):
    for recipe in RECIPES:
        ranks = 8 if path.stem in ("3d", "pipeline4-zero1", "zeropp") else 2
        made = plan(Options(recipe, path, world_size=ranks, device="A100-80", host_memory="1024GiB"))
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
def test_each_suggested_line_makes_it_fit(name, options):
    before = plan(Options(SEVEN, config(name), **options))
    assert before.fit.bad
    assert before.changes
    for line in before.changes:
        after = plan(Options(SEVEN, config(name), tuple(line.split()), **options))
        assert after.fit.device == "fits"
        assert not after.changes


def test_nothing_is_suggested_where_it_fits():
    made = plan(Options(SEVEN, config("zero3"), ("ds.train_micro_batch_size_per_gpu=1",), **ONE_NODE))
    assert made.fit.device == "fits"
    assert made.changes == ()


def test_offload_moves_the_optimizer_to_the_host_and_says_how_much_of_it(capsys):
    near = plan(Options(SEVEN, config("zero2"), **ONE_NODE))
    away = plan(Options(SEVEN, config("zero2-offload"), **ONE_NODE, host_memory="64GiB"))
    assert away.memory.optimizer == 0 < near.memory.optimizer
    assert away.time is None is not near.time
    assert away.memory.pinned > 16 * 6_738_415_616 // 8  # master, moments, gradient
    assert away.fit.host == "does not fit"
    arguments = ["--nodes", "1", "--gpus-per-node", "8", "--host-memory", "64GiB"]
    assert main(["plan", "--recipe", str(SEVEN), "--deepspeed_config", str(config("zero2-offload")), *arguments]) == 1
    assert "64 are there: does not fit" in capsys.readouterr().out


def test_of_a_folder_the_configs_that_fit_are_listed_with_what_they_need_the_best_first():
    options = {"nodes": 1, "ranks_per_node": 6, "device": "A100-80"}
    found = search(Options(SEVEN, ROOT / "ds_configs", ("batch.global_size=384",), **options))
    names = [one.config for one in found.choices]
    assert {*names, *found.others} == {path.stem for path in CONFIGS}
    assert names.index("zero3") < names.index("zero3-offload")  # waits for no bus
    assert "cannot be divided into groups of 8" in found.others["zeropp"]  # groups of 8 among 6 ranks
    for one in found.choices:
        made = plan(Options(SEVEN, config(one.config), ("batch.global_size=384", *one.words.split()), **options))
        assert made.fit.device == "fits"
    assert [one.order for one in found.choices] == sorted(one.order for one in found.choices)


def test_a_search_needs_configs_and_a_device(tmp_path):
    for folder, options, what in ((tmp_path, ONE_NODE, "no DeepSpeed config"), (ROOT / "ds_configs", {}, "a device")):
        with pytest.raises(UserError, match=what):
            search(Options(SEVEN, folder, **options))


def test_json_holds_every_figure(capsys):
    words = ["--recipe", str(SEVEN), "--deepspeed_config", str(config("zero3")), "--world-size", "64"]
    assert main(["plan", *words, "--device", "H100", "length.tokens=4.0e10", "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 6_738_415_616
    assert found["length"]["updates"] == -(-40_000_000_000 // 2048**2)
    assert found["data_parallel"] * found["micro_batch"] * found["accumulation"] == found["global_batch"] == 2048


def test_an_epoch_is_as_long_as_the_corpus_if_that_is_there(data, recipe):
    words = ("length={epochs: 2}",)
    made = plan(Options(recipe, config("zero1"), words))
    tokens = json.loads((data / "text.train.json").read_text())["tokens"]
    assert made.length.updates == -(-2 * (tokens // 32) // 4)
    gone = plan(Options(recipe, config("zero1"), (*words, "data.train=nowhere")))
    assert gone.length.updates is None
    assert "give length.tokens" in str(gone)


@pytest.mark.parametrize(
    ("options", "what", "do"),
    [
        ({"device": "H10"}, "there is no device H10 here", "write H100"),
        ({"host_memory": "much"}, "there is no device much here", "name one of"),
        ({"world_size": 7, "nodes": 2, "ranks_per_node": 4}, "two ways of saying how many", "keep one of them"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(options, what, do):
    with pytest.raises(UserError) as caught:
        plan(Options(SEVEN, config("zero1"), **options))
    (problem,) = caught.value.problems
    assert what in problem.what
    assert do in problem.do
