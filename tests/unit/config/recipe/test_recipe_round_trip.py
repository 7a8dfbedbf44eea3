"""A resolved recipe, written and loaded again, is the same recipe, for any valid values."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config.recipe import PRESETS, Recipe, load, to_yaml

TEXT = st.text(min_size=1).filter(
    lambda text: not text.endswith((".bin", ".idx")) and text[0] != "~" and "$" not in text
)
COUNT = st.integers(min_value=1, max_value=10**12)
MAYBE = st.none() | COUNT
RATE = st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    if draw(st.booleans()):
        return {"preset": draw(st.sampled_from(sorted(PRESETS))), "n_layer": draw(COUNT)}
    kv, group, width = draw(st.integers(1, 9)), draw(st.integers(1, 9)), 2 * draw(st.integers(1, 99))
    return {
        "n_layer": draw(COUNT),
        "n_head": kv * group,
        "n_kv_head": kv,
        "d_model": kv * group * width,
        "vocab_size": draw(COUNT),
        "seq_len": draw(COUNT),
        "position": draw(st.sampled_from(["learned", "rope"])),
        "norm": draw(st.sampled_from(["layernorm", "rmsnorm"])),
        "activation": draw(st.sampled_from(["gelu", "swiglu", "relu2"])),
        "dropout": draw(RATE),
        "rope_theta": draw(POSITIVE),
        "logit_softcap": draw(st.none() | POSITIVE),
        "qk_norm": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()),
        "init": draw(st.sampled_from(["normal", "zero_projections"])),
    }


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    muon, kind = draw(st.booleans()), draw(st.sampled_from(["warmup_decay", "warmup_cosine", "wsd"]))
    train = draw(st.lists(st.fixed_dictionaries({"path": TEXT, "weight": POSITIVE}), min_size=1, max_size=3))
    validation = draw(st.none() | TEXT.filter(lambda text: text not in [source["path"] for source in train]))
    tokenizer = draw(st.none() | TEXT)
    every = draw(MAYBE) if validation else None
    warmup, decay = draw(st.integers(0, 10**6)), draw(COUNT)
    lengths = [{"updates": warmup + decay + 1}, {"tokens": draw(COUNT)}, {"epochs": draw(POSITIVE)}]
    lr = draw(POSITIVE)
    return {
        "run_dir": draw(TEXT),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "precision": draw(st.sampled_from([None, "fp32", "bf16", "fp16"])),
        "model": draw(models()),
        "data": {"tokenizer": tokenizer, "train": train, "validation": validation},
        "batch": {"global_size": draw(COUNT)},
        "optimizer": {
            "type": "muon" if muon else "adamw",
            "lr": lr,
            "betas": [draw(RATE), draw(RATE)],
            "eps": draw(POSITIVE),
            "weight_decay": draw(RATE),
            "clip": draw(st.none() | POSITIVE),
            **({"muon_lr": draw(POSITIVE)} if muon else {}),
        },
        "schedule": {
            "type": kind,
            "warmup_updates": warmup,
            "min_lr": draw(st.sampled_from([0.0, lr / 2])),
            "decay_updates": decay if kind == "wsd" else None,
        },
        "length": draw(st.sampled_from(lengths)),
        "evaluation": {"every": every, "prompt": draw(st.text()) if every and tokenizer else None},
        "checkpoint": {"every": draw(MAYBE), "keep_last": draw(MAYBE)},
    }


@settings(max_examples=60, deadline=None)
@given(recipes())
def test_written_recipe_loads_back_equal(values: dict[str, Any]):
    recipe = Recipe.model_validate(values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_text(to_yaml(recipe), encoding="utf-8", newline="")
        again = load(path)
    assert again == recipe
    assert to_yaml(again) == to_yaml(recipe)
