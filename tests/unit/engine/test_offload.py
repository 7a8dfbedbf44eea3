"""Offloading to NVMe: a folder per run, and buffers that fit the model."""

import pytest

from megagpt.config import recipe as recipes
from megagpt.engine import offload
from megagpt.errors import UserError

RECIPE = """
run_dir: {run}
model: {{n_layer: 2, n_head: 4, d_model: 64, vocab_size: 1000, seq_len: 32}}
data: {{train: corpus}}
batch: {{global_size: 8}}
optimizer: {{lr: 1.0e-3}}
schedule: {{warmup_updates: 1}}
length: {{updates: 10}}
"""


@pytest.fixture
def recipe(tmp_path):
    def of(run):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(run=run))
        return recipes.load(path)

    return of


def on_nvme(path, **more):
    section = {"device": "nvme", "nvme_path": str(path), **more}
    return {"zero_optimization": {"stage": 3, "offload_param": section, "offload_optimizer": dict(section)}}


@pytest.fixture
def built(monkeypatch):
    """Pretend that DeepSpeed's operator can be loaded."""
    monkeypatch.setattr(offload.deepspeed_ops, "load", lambda *_, **__: None)


def test_nothing_changes_without_nvme(recipe):
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert offload.configure_nvme(config, recipe("a"), 2) == config
    assert offload.offload_device(config, "optimizer") == "cpu"
    assert offload.offload_device(config, "param") == "none"
    assert offload.clear_swap_folders(config, 0) == []


def test_buffers_hold_one_partition_of_the_largest_parameter(recipe, tmp_path, built):
    filled = offload.configure_nvme(on_nvme(tmp_path), recipe("a"), 3)["zero_optimization"]["offload_param"]
    assert filled["buffer_size"] == 21_334  # 1000 x 64 by 3, rounded up
    stated = offload.configure_nvme(on_nvme(tmp_path, buffer_size=5, buffer_count=7), recipe("a"), 3)
    assert stated["zero_optimization"]["offload_param"]["buffer_size"] == 5
    assert stated["zero_optimization"]["offload_param"]["buffer_count"] == 7


def test_each_run_has_its_own_folder_and_removes_it(recipe, tmp_path, built):
    config, other = (offload.configure_nvme(on_nvme(tmp_path / "nvme"), recipe(run), 1) for run in ("a", "b"))
    path = config["zero_optimization"]["offload_optimizer"]["nvme_path"]
    assert path != other["zero_optimization"]["offload_optimizer"]["nvme_path"]
    left, theirs = (offload.clear_swap_folders(config, rank)[0] / "1.swp" for rank in (0, 1))
    for file in (left, theirs):
        file.parent.mkdir(parents=True)
        file.touch()
    folders = offload.clear_swap_folders(config, 0)  # files of a killed run, found by the next start
    assert not left.exists()
    offload.remove_swap_folders(folders)
    assert theirs.exists()
    offload.remove_swap_folders(offload.clear_swap_folders(config, 1))
    assert not (tmp_path / "nvme" / path).exists()


def test_an_operator_that_cannot_be_built_is_a_user_error(recipe, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no libaio.h\nat line 1")

    monkeypatch.setattr(offload.deepspeed_ops, "load", fail)
    with pytest.raises(UserError) as caught:
        offload.configure_nvme(on_nvme(tmp_path), recipe("a"), 1)
    assert str(caught.value) == (
        "megagpt: offload to NVMe needs DeepSpeed's operator async_io, which cannot be built here\n"
        "  no libaio.h\n"
        "  do: install libaio's headers (Debian: libaio-dev) and a C++ compiler, or offload to cpu"
    )
