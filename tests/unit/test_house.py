"""The code has the structure that ARCHITECTURE.md describes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "megagpt").rglob("*.py"))
LEVELS = {  # a room imports rooms of lower levels only
    **dict.fromkeys(("megagpt", "errors"), 0),
    **dict.fromkeys(("files", "state"), 1),
    **dict.fromkeys(("config", "cluster"), 2),
    **dict.fromkeys(("tokenizer", "model"), 3),
    **dict.fromkeys(("corpus", "checkpoint"), 4),
    "data": 5,
    **dict.fromkeys(("prepare", "engine"), 6),
    "inference": 7,
    "training": 8,
    **dict.fromkeys(("plan", "report"), 9),
    "doctor": 10,
    "parity": 11,
    "cli": 12,
    **dict.fromkeys(("__main__", "__init__"), 13),  # the package's public functions import when they are called
}


def room(dotted: str) -> str:
    """Return the room of `megagpt.x.y`. The package itself counts as its lowest room."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "megagpt"


def imports(path: Path):
    """Yield (line, dotted name) of every import in a file, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            joined = node.module == "megagpt"
            yield from ((node.lineno, f"{node.module}.{a.name}" if joined else node.module) for a in node.names)


def name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_rooms_import_only_lower_rooms():
    wrong = []
    for path in MODULES:
        here = room(name(path))
        for line, target in imports(path):
            if target.split(".")[0] != "megagpt":
                continue
            there = room(target)
            there = there if there in LEVELS else "megagpt"  # a name that the package itself defines
            if there != here and LEVELS[there] >= LEVELS[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert wrong == []


@pytest.mark.parametrize("here", sorted({room(name(path)) for path in MODULES}))
def test_rooms_have_no_import_cycles(here):
    """Imports under TYPE_CHECKING and inside functions count, too."""
    modules = {name(path).removesuffix(".__init__"): path for path in MODULES if room(name(path)) == here}
    edges = {}
    for module, path in modules.items():
        froms = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = [(node.module, f"{node.module}.{alias.name}") for node in froms for alias in node.names]
        edges[module] = {full if full in modules else parent for parent, full in names} & modules.keys()
    while leaves := {module for module, targets in edges.items() if not targets & edges.keys()}:
        edges = {module: targets for module, targets in edges.items() if module not in leaves}
    assert edges == {}


def test_only_the_engine_imports_deepspeed():
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
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 80:
                long.append(f"{path.name}:{node.lineno} {node.name}")
    assert long == []


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import megagpt", ("torch", "deepspeed", "numpy", "pydantic")),
        ("import megagpt.cli", ("torch", "deepspeed", "numpy", "sentencepiece")),
        ("import megagpt.config.recipe", ("torch", "deepspeed")),
        ("import megagpt.config.deepspeed", ("torch", "deepspeed")),
        ("import megagpt.prepare.command", ("torch", "deepspeed")),
        ("import megagpt.report", ("torch", "deepspeed")),
        ("import megagpt.plan", ("torch", "deepspeed")),
        ("import megagpt.training.loop", ("deepspeed",)),
    ],
)
def test_light_modules_do_not_import_heavy_packages(code, absent):
    program = f"import sys; {code}; print([m for m in {absent!r} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def _table_rows(heading):
    """Cells of the rows of the first table under a heading of ARCHITECTURE.md, without the head."""
    section = (ROOT / "ARCHITECTURE.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_table_of_packages_has_all_of_them_in_the_order_of_imports():
    rows = [re.findall(r"`([\w/]+)`", row[0]) for row in _table_rows("Packages")]
    names = [name.rstrip("/") for row in rows for name in row]
    assert sorted(names) == sorted(LEVELS.keys() - {"megagpt", "__main__", "__init__"})
    levels = [LEVELS[name] for name in names]
    assert levels == sorted(levels)


def test_every_question_of_a_newcomer_is_answered_by_files_that_exist():
    rows = _table_rows("Where is …?")
    assert len(rows) >= 20
    for question, answer in rows:
        files = re.findall(r"`([^`]+)`", answer)
        assert files, question
        assert [file for file in files if not (ROOT / file).is_file()] == [], question


@pytest.mark.parametrize("document", ["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_documents_name_and_link_to_files_that_exist(document):
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    named = re.findall(r"\b((?:tests|megagpt|launch|docs|ds_configs)/[\w./-]*\w\.(?:py|sh|md|yaml|json))", text)
    rooms = "|".join(LEVELS.keys() - {"megagpt"})
    inner = re.findall(rf"`((?:{rooms})/[\w./]*\.py)`", text)  # a path inside the package
    wanted = [*links, *named, *(f"megagpt/{path}" for path in inner)]
    assert [path for path in wanted if not (ROOT / path).exists()] == []


def test_each_decision_names_a_test_that_exists():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    decisions = re.split(r"\n\d+\. ", text.split("## Decisions")[1])[1:]
    assert len(decisions) >= 10
    for decision in decisions:
        proofs = re.findall(r"tests/[\w/]+\.(?:py|sh)", decision.split("*Proof:")[1])
        assert proofs, decision
        for proof in proofs:
            assert (ROOT / proof).exists(), proof


def test_the_repository_contains_no_absolute_paths():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    found = []
    for file in tracked:
        text = (ROOT / file).read_text(errors="replace")
        found += [f"{file}: {path}" for path in re.findall(r"(?<![\w.])/(?:home|root|work|Users)/\S+", text)]
    assert found == []
