"""The structure that ARCHITECTURE.md draws is the structure of the code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "megagpt").rglob("*.py"))
BASE = ("errors", "state", "files", "recipe", "ds_config", "distributed")
LEVELS = {**dict.fromkeys(BASE, 1), "data": 2, "model": 2, "engine": 3, "run": 3}


def room(dotted: str) -> str:
    """The room of `megagpt.x.y`; the package itself counts as its lowest room."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "errors"


def imports(path: Path):
    """(line, dotted name) of every import in a file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            joined = node.module == "megagpt"
            yield from ((node.lineno, f"{node.module}.{a.name}" if joined else node.module) for a in node.names)


def name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_imports_go_one_way():
    wrong = []
    for path in MODULES:
        here = room(name(path))
        for line, target in imports(path):
            if target.split(".")[0] != "megagpt":
                continue
            there = room(target)
            same, lower = there == here, LEVELS.get(there, 4) < LEVELS.get(here, 4)
            verbs = LEVELS.get(here, 4) == LEVELS.get(there, 4) == 4 or LEVELS.get(here) == LEVELS.get(there) == 1
            if not (same or lower or verbs):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert wrong == []


def test_base_modules_do_not_import_each_other_in_a_circle():
    edges = {
        (room(name(path)), room(target))
        for path in MODULES
        if room(name(path)) in BASE
        for _, target in imports(path)
        if target.startswith("megagpt.") and room(target) != room(name(path))
    }
    assert not [edge for edge in edges if edge[::-1] in edges]


def test_only_the_engine_room_knows_deepspeed():
    users = {room(name(path)) for path in MODULES for _, target in imports(path) if target.split(".")[0] == "deepspeed"}
    assert users == {"engine"}


def test_the_loop_fits_one_screen():
    tree = ast.parse((ROOT / "megagpt/training/loop.py").read_text())
    (loop,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "loop")
    assert loop.end_lineno - loop.lineno < 45
    assert not any(isinstance(node, ast.ClassDef) for node in tree.body)


def test_no_file_and_no_function_is_too_long():
    long = []
    for path in MODULES:
        text = path.read_text()
        if text.count("\n") > 500:
            long.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 60:
                long.append(f"{path.name}:{node.lineno} {node.name}")
    assert long == []


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import megagpt.cli", ("torch", "deepspeed", "numpy", "sentencepiece")),
        ("import megagpt.config.recipe", ("torch", "deepspeed")),
        ("import megagpt.config.deepspeed", ("torch", "deepspeed")),
        ("import megagpt.prepare", ("torch", "deepspeed")),
        ("import megagpt.report", ("torch", "deepspeed")),
        ("import megagpt.plan", ("torch", "deepspeed")),
        ("import megagpt.training.loop", ("deepspeed",)),
    ],
)
def test_what_needs_no_torch_loads_none(code, absent):
    program = f"import sys; {code}; print([m for m in {absent!r} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_each_decision_names_a_test_that_exists():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    decisions = re.split(r"\n\d+\. ", text.split("## Decisions")[1])[1:]
    assert len(decisions) >= 10
    for decision in decisions:
        proofs = re.findall(r"tests/[\w/]+\.(?:py|sh)", decision.split("*Proof:")[1])
        assert proofs, decision
        for proof in proofs:
            assert (ROOT / proof).exists(), proof


def test_the_repository_names_no_machine_and_no_absolute_path():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    found = []
    for file in tracked:
        text = (ROOT / file).read_text(errors="replace")
        found += [f"{file}: {word}" for word in re.findall(r"(?<![\w.])/(?:home|root|work|Users)/\S+", text)]
    assert found == []
