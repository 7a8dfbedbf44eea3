"""Language of the project: no archaic or private words, "per" instead of "a", no docstring that begins with "Of".

Checked are comments, docstrings and string literals of Python files, comments of configs and scripts, and all prose of
documents. A part of the project is covered once it is listed in COVERED.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COVERED = (
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "SECURITY.md",
    "docs/deepspeed-config.md",
    "docs/first-gpu-day.md",
    "docs/metrics.md",
    "docs/migration.md",
    "docs/parity.md",
    "docs/recipe.md",
    "docs/troubleshooting.md",
    "docs/tutorials",
    "ds_configs",
    "launch/hosts.example",
    "launch/install.sh",
    "launch/kubernetes.yaml",
    "launch/parity.py",
    "launch/pretrain.py",
    "launch/quickstart.sh",
    "launch/recipes",
    "launch/slurm",
    "megagpt/__init__.py",
    "megagpt/__main__.py",
    "megagpt/checkpoint",
    "megagpt/cli",
    "megagpt/cluster",
    "megagpt/config",
    "megagpt/corpus",
    "megagpt/data",
    "megagpt/doctor",
    "megagpt/engine",
    "megagpt/errors.py",
    "megagpt/files.py",
    "megagpt/inference",
    "megagpt/model",
    "megagpt/parity",
    "megagpt/plan",
    "megagpt/prepare",
    "megagpt/prepare/plain_data.py",
    "megagpt/prepare/process_group.py",
    "megagpt/prepare/sockets.py",
    "megagpt/report.py",
    "megagpt/state.py",
    "megagpt/tokenizer",
    "megagpt/training",
    "setup.py",
    "tests/benchmarks",
    "tests/conftest.py",
    "tests/docs",
    "tests/faults",
    "tests/forks.py",
    "tests/parity",
    "tests/training.py",
    "tests/unit/config",
    "tests/unit/corpus",
    "tests/unit/data",
    "tests/unit/engine",
    "tests/unit/inference",
    "tests/unit/model",
    "tests/unit/plan",
    "tests/unit/prepare",
    "tests/unit/test_cli.py",
    "tests/unit/test_help.py",
    "tests/unit/test_house.py",
    "tests/unit/test_not_proven.py",
    "tests/unit/test_other_systems.py",
    "tests/unit/test_security.py",
    "tests/unit/tokenizer",
)
NOT_YET = (  # of the covered folders
    "megagpt/prepare/plain_data.py",
    "megagpt/prepare/process_group.py",
    "megagpt/prepare/sockets.py",
    "tests/unit/prepare/test_process_group.py",
)

BANNED = {
    r"anew": "again, from scratch",
    r"lest": "so that … not",
    r"rubbish": "uninitialized, garbage",
    r"mend(s|ed|ing)?": "fix",
    r"dear(er|est)?": "expensive, slower",
    r"beside": "next to, in addition to",
    r"upon": "on",
    r"for ever": "forever",
    r"go(es)? on": "resume, continue",
    r"typed again": "run again",
    r"blanks": "spaces",
    r"stretch(es)?": "range, slice",
    r"told": "reported, passed, printed",
    r"tells?": "reports, passes, prints",
    r"sa(y|ys|id)": "report, state, print, record",
    r"asked": "requested",
    r"yardsticks?": "baseline",
    r"odd (document|place|input|line|byte|value)s?": "invalid, unusual",
    r"shares? of": "fraction of, shard of",
    r"lies? (in|on|there)": "is in",
    r"stands? (in|at|there)": "is in",
    r"so many": "this many, the given number of",
    r"in words": "as text",
}
_UNITS = r"(tokens?|samples?|updates?|[kMGT]i?B|bytes|M?FLOPs?|nats|bits|seconds|ms|ranks|GPUs|requests|lines)"
_PER = r"(token|update|rank|node|epoch|checkpoint|second|sample|parameter|step|GPU|batch|host|document)"
A_FOR_PER = re.compile(rf"\b{_UNITS} an? {_PER}\b")
WORDS = re.compile(rf"\b({'|'.join(BANNED)})\b", re.IGNORECASE)

# the yardsticks option is a public name; the slogan is "A recipe says what is trained …"
ALLOWED = {
    "ARCHITECTURE.md": ("says",),
    "README.md": ("says", "yardsticks"),
    "megagpt/cli/run.py": ("yardsticks",),
    "megagpt/training/console.py": ("say",),  # its method
    "megagpt/corpus/metadata.py": ("stretches",),  # a key of sidecars that earlier versions wrote
    "megagpt/inference/evaluate.py": ("yardsticks",),  # a key of --json
    "megagpt/plan/verdict.py": ("tell",),  # a value of --json: too close to tell
    "tests/unit/corpus/test_corpus_reader.py": ("stretches",),  # the key above
    "tests/unit/inference/test_evaluate.py": ("yardsticks",),
}


def mistakes(text):
    """Banned words and phrases in a text."""
    return [match.group() for pattern in (WORDS, A_FOR_PER) for match in pattern.finditer(text)]


def python_texts(source):
    """(line, text, is a docstring) of every comment and string literal of a Python file."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value, id(node) in docstrings
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string, False


def texts(path):
    """(line, text, is a docstring) of everything in a file that is written for people."""
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from python_texts(content)
    elif path.suffix == ".md":
        yield from ((number, line, False) for number, line in enumerate(content.splitlines(), 1))
    else:
        for number, line in enumerate(content.splitlines(), 1):
            _, mark, comment = line.partition("//" if path.suffix == ".json" else "#")
            if mark:
                yield number, comment, False


def covered_files():
    for name in COVERED:
        path = ROOT / name
        assert path.exists(), f"{name} is covered, but does not exist"
        suffixes = {".py", ".md", ".sh", ".sbatch", ".yaml", ".json"}
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in suffixes)
        skipped = {ROOT / name for name in NOT_YET}
        yield from (file for file in files if file.name != "known_keys.json" and file not in skipped)


def test_covered_parts_use_plain_words():
    found = []
    for path in covered_files():
        name = path.relative_to(ROOT).as_posix()
        for line, text, _ in texts(path):
            wrong = [word for word in mistakes(text) if word not in ALLOWED.get(name, ())]
            found += [f"{name}:{line}: {word!r} in {text.strip()[:80]!r}" for word in wrong]
    assert found == []


def test_no_docstring_begins_with_of():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in covered_files()
        for line, text, is_docstring in texts(path)
        if is_docstring and re.match(r"\s*of\b", text, re.IGNORECASE)
    ]
    assert found == []


def test_no_overrides_or_arguments_are_called_words():
    found = []
    for path in covered_files():
        if path.suffix == ".py" and path.parent.name != "tokenizer":  # words of a text
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if getattr(node, "id", getattr(node, "arg", None)) in ("word", "words"):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: overrides, arguments or kwargs")
    assert found == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("# a folder beside the run\n", ["beside"]),
        ('def f():\n    """Mend that line."""\n', ["Mend"]),
        ('x = 1\nprint(f"{x} samples an update")\n', ["samples an update"]),
        ('print("resume to go on")\n', ["go on"]),
        ('print("mended, recommended, tokens per update")\n', ["mended"]),
        ("message = 'a sample, an update'\n", []),
    ],
)
def test_mistakes_are_found_in_comments_docstrings_and_literals(source, expected):
    assert [word for _, text, _ in python_texts(source) for word in mistakes(text)] == expected
