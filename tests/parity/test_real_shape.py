"""The shrunk model is split like the real one, and real stages that do not fit together are found."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config import recipe as recipes
from megagpt.config.deepspeed import Layout, Resolved
from megagpt.config.recipe import PRESETS, ModelSection
from megagpt.engine.optim import build as optimizers
from megagpt.engine.parallel import tensor
from megagpt.model import flops
from megagpt.model.layers import Block
from megagpt.model.parallel import WHOLE
from megagpt.parity import real_shape, shrink

ROOT = Path(__file__).parents[2]
STAGES = (2, 3, 4, 5, 6, 8, 12, 16)
ADAMW = ROOT / "launch/recipes/gpt2-124m-openwebtext.yaml"
MUON = ROOT / "launch/recipes/quickstart.yaml"


@cache
def recipe_of(path):
    return recipes.load(path, ("precision=fp32",))


def resolved(path, section, pipeline, tensor_parallel=1, sequence_parallel=1):
    degree = pipeline * tensor_parallel * sequence_parallel
    layout = Layout(degree, 1, 2, pipeline, 1, pipeline, tensor_parallel, sequence_parallel)
    return Resolved({}, layout, recipe_of(path).model_copy(update={"model": section}), ())


def shrunk(real):
    return replace(
        real, recipe=real.recipe.model_copy(update={"model": shrink.shrunk_model(real.recipe.model, real.layout)})
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_keeps_its_stages_when_it_is_shrunk(preset, tied):
    section = ModelSection(**{**PRESETS[preset], "tie_embeddings": tied})
    for number in (number for number in STAGES if number <= section.n_layer):
        small = shrunk(resolved(MUON, section, number)).recipe.model
        assert flops.stage_kinds(small, number) == flops.stage_kinds(section, number)
        assert flops.parameters(small) < 8e6


@pytest.mark.parametrize("path", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize(("preset", "number"), [("quickstart", 4), ("gpt2-124m", 5), ("llama-1b", 12)])
def test_the_same_kinds_of_layer_mean_the_same_parameter_groups(preset, number, path):
    real = resolved(path, ModelSection(**PRESETS[preset]), number)
    small, built = shrunk(real), real_shape.build_stages(real)
    assert real_shape.stage_problems(built, real) == []
    assert real_shape.same_stages(built, real_shape.build_stages(small))


def test_the_shrunk_quickstart_also_has_the_head_alone_on_the_last_stage():
    """With two blocks per stage and a small vocabulary, as in an earlier version, every stage would have a block."""
    real = resolved(MUON, ModelSection(**PRESETS["quickstart"]), 4)
    blocks = ("embedding", "block"), ("block",), ("block", "norm"), ("head",)
    assert tuple(flops.stage_kinds(real.recipe.model, 4)) == blocks
    assert tuple(flops.stage_kinds(shrunk(real).recipe.model, 4)) == blocks
    former = real.recipe.model.model_copy(update={"n_layer": 8, "d_model": 64, "d_ff": 256, "vocab_size": 128})
    assert flops.stage_kinds(former, 4)[3] == ("block", "norm", "head")
    built = real_shape.build_stages(real)
    assert [len(stage.groups) for stage in built] == [4, 3, 3, 1]


SHAPES = st.fixed_dictionaries({
    "degree": st.integers(1, 4), "kv": st.sampled_from([1, 2, 4]), "group": st.sampled_from([1, 2, 4]),
    "head_dim": st.sampled_from([4, 8, 64, 128]), "ratio": st.sampled_from([1, 4]), "stages": st.integers(1, 6),
    "more": st.integers(0, 10), "vocab_size": st.integers(50, 130_000), "seq_len": st.sampled_from([16, 128, 8192]),
    "position": st.sampled_from(["learned", "rope"]), "activation": st.sampled_from(["gelu", "swiglu"]),
    "tied": st.booleans(),
})  # fmt: skip


@given(SHAPES)
def test_shrinking_keeps_everything_that_determines_the_split(shape):
    width = shape["degree"] * shape["kv"] * shape["group"] * shape["head_dim"]
    section = ModelSection(
        n_layer=shape["stages"] + shape["more"], n_head=width // shape["head_dim"],
        n_kv_head=shape["degree"] * shape["kv"], d_model=width, d_ff=shape["ratio"] * width,
        vocab_size=shape["vocab_size"], seq_len=shape["seq_len"], position=shape["position"],
        activation=shape["activation"], tie_embeddings=shape["tied"],
    )  # fmt: skip
    layout = Layout(shape["stages"] * shape["degree"], 1, 2, 4, 1, shape["stages"], shape["degree"])
    small = shrink.shrunk_model(section, layout)
    assert flops.stage_kinds(small, shape["stages"]) == flops.stage_kinds(section, shape["stages"])
    assert small.n_head // small.n_kv_head == shape["group"]
    assert small.n_kv_head % shape["degree"] == small.d_ff % shape["degree"] == 0
    assert (small.vocab_size % shape["degree"] == 0) == (section.vocab_size % shape["degree"] == 0)


GPT2 = ModelSection(**PRESETS["gpt2-124m"])


def found(real):
    return real_shape.stage_problems(real_shape.build_stages(real), real)


def test_a_vocabulary_that_does_not_divide_is_valid():
    assert found(resolved(ADAMW, GPT2, 2, 2)) == []


def test_shards_of_the_wrong_shape_are_found(monkeypatch):
    monkeypatch.setattr(tensor, "parallel_layers", lambda *_: WHOLE)
    lines = found(resolved(ADAMW, GPT2, 2, 2))
    assert "layers.2.attention.qkv.weight has shape [2304, 768] on a rank, which is not 1/2 of [2304, 768]" in lines


def test_stages_with_groups_in_another_order_are_found(monkeypatch):
    build = optimizers.build

    def reversed_without_embedding(section, model, **options):
        optimizer = build(section, model, **options)
        if "0" not in model:
            optimizer.param_groups.reverse()
        return optimizer

    monkeypatch.setattr(optimizers, "build", reversed_without_embedding)
    assert found(resolved(ADAMW, GPT2, 3)) == [
        "stage 1 (block) has other parameter groups than the whole model"
    ]  # the last stage of a tied model holds the embedding


def test_data_of_another_shape_between_stages_is_found(monkeypatch):
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, *rest: forward(self, x, *rest)[:, 1:])
    (line,) = found(resolved(ADAMW, GPT2, 2))
    assert line.startswith("stage 0 sends [2, 10")
    assert line.endswith("expects [2, 1024, 768] fp32")
