"""docs/metrics.md names every event that a run writes, and every value of an update."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
ROWS = dict(re.findall(r"^\| `(\w+)` \| .*? \| (.*) \|$", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE))


def written():
    """Event (or None where a variable names it) and names of the values, of each call of `metrics.write`."""
    for path in (ROOT / "megagpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("metrics.write"):
                event = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
                yield event, [keyword.arg for keyword in node.keywords if keyword.arg]


def test_every_event_is_named_and_no_other():
    events = {event for event, _ in written()} - {None}
    assert {*ROWS} == events | {"start", "resume", "branch"}  # these three by one call


def test_every_value_that_a_call_names_is_explained():
    for event, values in written():
        for value in values if event else ():
            assert value == "update" or f"`{value}`" in ROWS[event], (event, value)
