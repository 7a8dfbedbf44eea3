"""docs/parity.md and README.md name layouts and tests that exist, with their correct number."""

import ast
import re
from pathlib import Path

from tests.parity.layouts import CASES
from tests.parity.tables import table

ROOT = Path(__file__).parents[2]


def test_the_head_of_the_table_is_up_to_date():
    """Compares all but the versions, which are those of the machine that wrote the table."""
    written = (ROOT / "docs/parity.md").read_text()
    empty = dict.fromkeys(("loss", "norm", "held-out", "weights"), 0.0)
    now = table({case.id: empty for case in CASES}, full=True)

    def head(text):
        fewer_updates = r"; the rows named `stages-…` \d+"  # the note on rows that were measured over fewer updates
        return re.sub(rf"deepspeed [^,]+, torch [^ ]+\.|{fewer_updates}", "", text.split("\n| layout")[0])

    assert head(written) == head(now)


def test_the_readme_names_layouts_and_tests_that_exist():
    section = (
        (ROOT / "README.md").read_text().split("## What this solves for users of DeepSpeed today")[1].split("\n## ")[0]
    )
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    faults = ast.parse((ROOT / "tests/unit/engine/test_deepspeed_faults.py").read_text())
    tests = {node.name for node in faults.body if isinstance(node, ast.FunctionDef)}
    ids = {case.id for case in CASES}
    assert len(lines) == 10
    for _, _, test, rows in lines:
        assert set(re.findall(r"`(.+?)`", test)) <= tests
        assert set(re.findall(r"`(.+?)`", rows)) <= ids
        assert test.strip() or rows.strip()
