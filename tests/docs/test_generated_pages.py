"""docs/recipe.md and docs/deepspeed-config.md are fresh, and show every combination that is refused."""

import ast
import sys

import pytest

from megagpt.config.deepspeed import activation_checkpointing, batch, ownership, parallelism, precision, unsupported
from megagpt.config.deepspeed.view import ConfigView
from megagpt.errors import Problem
from tests.docs import generate


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_generated_page_is_fresh(name):
    written = (generate.DOCS / name).read_text(encoding="utf-8")
    assert written == generate.PAGES[name](), "run: python -m tests.docs.generate"


def problem_calls(module):
    """(file, first line, last line) of every call that makes a problem."""
    with open(module.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "Problem",
            "problem",
        ):
            yield module.__file__, node.lineno, node.end_lineno


def test_every_refusal_of_a_combination_is_shown(monkeypatch):
    """Run all examples of the page, and note which lines of the checks report a problem."""
    reached = set()

    def note():
        frame = sys._getframe(2)
        reached.add((frame.f_code.co_filename, frame.f_lineno))

    original = ConfigView.problem

    def problem(*arguments, **keywords):
        note()
        return original(*arguments, **keywords)

    def make_problem(*arguments):
        note()
        return Problem(*arguments)

    monkeypatch.setattr(ConfigView, "problem", problem)
    for module in (batch, ownership):
        monkeypatch.setattr(module, "Problem", make_problem)
    for overrides, config, ranks in generate.COMBINATIONS:
        generate.problems(overrides, config, ranks)
    for setting in unsupported.UNSUPPORTED_SETTINGS[:1]:  # all are in a table of their own
        *sections, name = setting.key.split(".")
        config = {name: {}}
        for section in reversed(sections):
            config = {section: config}
        generate.problems([], config, 1)

    modules = (activation_checkpointing, batch, ownership, parallelism, precision, unsupported)
    calls = [call for module in modules for call in problem_calls(module)]
    assert len(calls) >= 20
    missing = [
        (file, first)
        for file, first, last in calls
        if not any(file == where and first <= line <= last for where, line in reached)
    ]
    assert missing == []
