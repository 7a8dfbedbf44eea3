"""`megagpt keys` lists every key that a recipe may have, each with a help text."""

import pytest
import yaml

from megagpt.config import recipe as recipes
from megagpt.config.recipe.reference import keys
from megagpt.errors import UserError


def dotted(values, dot=""):
    for name, value in values.items():
        yield from dotted(value, f"{dot}{name}.") if isinstance(value, dict) else [dot + name]


def test_all_keys_of_a_resolved_recipe_are_listed_with_help(recipe):
    listed = {key.name: key for key in keys().keys}
    written = yaml.safe_load(recipes.to_yaml(recipes.load(recipe, ())))
    assert set(dotted(written)) == {name for name in listed if "[]" not in name}
    assert {"data.train[].path", "data.train[].weight", "data.train[].max_epochs"} < set(listed)
    assert all(key.help for key in listed.values())


def test_types_and_defaults_are_formatted_as_in_yaml():
    listed = {key.name: (key.type, key.default) for key in keys().keys}
    assert listed["precision"] == ("fp32, bf16 or fp16, or null", "null")
    assert listed["optimizer.betas"] == ("a list of 2 numbers", "[0.9, 0.95]")
    assert listed["optimizer.eps"] == ("a number, above 0", "1.0e-8")
    assert listed["optimizer.lr"] == ("a number, above 0", "")


def test_names_select_sections_or_parts_of_keys():
    assert [key.name for key in keys(("log",)).keys] == ["log.every", "log.hang_after"]
    assert [key.name for key in keys(("weight", "lr")).keys] == ["data.train[].weight", "optimizer.lr"]
    with pytest.raises(UserError) as caught:
        keys(("optimizer.muonlr",))
    assert str(caught.value) == "megagpt: no key of a recipe has the name optimizer.muonlr\n  do: try optimizer.muon_lr"
