"""What the documents mention exists: commands, options, recipe keys, DeepSpeed keys, files, and links.

Commands are read from fenced blocks and from code in the text. Capital letters and `…` are placeholders.
"""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from megagpt.cli import app
from megagpt.config.deepspeed.known_keys import recorded_keys
from megagpt.config.recipe.checking import known_keys
from megagpt.config.recipe.sections import Source
from tests.training import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "docs|launch|ds_configs|megagpt|tests"
SCRIPTS = {"launch/pretrain.py": "train", "launch/parity.py": "parity"}
RECIPE_KEYS = {*known_keys(), *(f"data.train[].{name}" for name in Source.model_fields)}
SECTIONS = {key.partition(".")[0] for key in RECIPE_KEYS if "." in key}
NOT_OURS = {"optimizer.params", "optimizer.legacy_fusion", "scheduler.params"}  # sections of a DeepSpeed config


def text_of(path):
    return path.read_text(encoding="utf-8")


def code(text):
    """(line, code) of every fenced block and every code span; continued lines of a block are joined."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for match in fence.finditer(text):
        number = text.count("\n", 0, match.start()) + 2
        if match[1] in ("bash", ""):
            for line in match[2].replace("\\\n", "  ").splitlines():
                yield number, line
    prose = fence.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in re.finditer(r"`([^`\n]+)`", prose):
        yield prose.count("\n", 0, match.start()) + 1, match[1]


def commands(line):
    """Argument lists of the megagpt commands in a line of shell, each with its subcommand first."""
    try:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        lexer.commenters = "#"
        tokens = list(lexer)
    except ValueError:  # an apostrophe in a code span
        return
    for index, token in enumerate(tokens):
        before = tokens[index - 1] if index else ""
        is_command = token == "megagpt" and before not in ("install", "but")  # pip install megagpt; a quoted message
        if is_command or token in SCRIPTS:
            rest = tokens[index + 1 :]
            end = next((place for place, other in enumerate(rest) if re.fullmatch(r"[|&;<>()]+", other)), len(rest))
            first = [SCRIPTS[token]] if token in SCRIPTS else []
            if first or rest[:end]:
                yield first + rest[:end]


def mistakes(arguments):
    """What is wrong with the arguments of `megagpt`."""
    command = typer.main.get_command(app)
    arguments = [token for token in arguments if token not in ("…", "")]
    while arguments and hasattr(command, "commands") and not arguments[0].startswith("-"):
        name = arguments.pop(0).rstrip(",.:")
        if name not in command.commands:
            return [f"no command {name}"]
        command = command.commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    options = [token.partition("=")[0] for token in arguments if token.startswith("--")]
    wrong = [f"{command.name} has no option {option}" for option in options if option not in {*known, "--help", "--"}]
    if command.name in ("train", "plan", "parity", "doctor"):
        overrides = [token.partition("=")[0] for token in arguments if "=" in token and not token.startswith("-")]
        wrong += [f"no key {key}" for key in overrides if not is_key(key)]
    return wrong


def is_key(key):
    """Whether this is a key of a recipe, or with `ds.` one of a DeepSpeed config (ds.key stands for any)."""
    if key == "ds.key":
        return True
    if not key.startswith("ds."):
        return key in RECIPE_KEYS
    node = recorded_keys()
    for name in key.split(".")[1:]:
        node = node.get("properties", {}).get(name)
        if node is None:
            return False
    return True


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_options_and_overrides_exist(path):
    found = [
        f"{path.name}:{line}: {wrong} in {text!r}"
        for line, text in code(text_of(path))
        for arguments in commands(text)
        for wrong in mistakes(arguments)
    ]
    assert found == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_keys_in_code_exist(path):
    wrong = []
    for line, text in code(text_of(path)):
        for key in re.findall(r"^((?:ds\.)?[a-z_]+(?:\.[a-z_0-9]+)+)(?:=\S*|: .*)?$", text):
            ours = key.startswith("ds.") or key.partition(".")[0] in SECTIONS
            is_deepspeed = any(key == name or key.startswith(f"{name}.") for name in NOT_OURS)
            if ours and not is_deepspeed and not is_key(key) and not is_key(f"ds.{key}"):
                wrong.append(f"{path.name}:{line}: {key}")
    assert wrong == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_links_exist(path):
    text = text_of(path)
    without_urls = re.sub(r"https?://\S+", "", text)
    mentioned = re.findall(rf"(?<![\w/.*-])((?:{FOLDERS})/[\w./-]*\w)", without_urls)
    wrong = [name for name in mentioned if not re.search(r"\b[RD]\.(yaml|json)$", name) and not (ROOT / name).exists()]
    for link in re.findall(r"\]\(([^)\s]+)\)", without_urls):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists():
            wrong.append(link)
        elif anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)", text_of(target), re.MULTILINE)
            if anchor not in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}:
                wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("megagpt plan --recipe R.yaml --device H100 | head", []),
        ("megagpt plan --recipes R.yaml", ["plan has no option --recipes"]),
        ("srun megagpt prepar x", ["no command prepar"]),
        ("deepspeed launch/pretrain.py --recipe R.yaml model.layers=2", ["no key model.layers"]),
        ("megagpt train ds.zero_optimization.stage=2 ds.bf16.enable=true", ["no key ds.bf16.enable"]),
        ("pip install megagpt", []),
    ],
)  # fmt: skip
def test_mistakes_are_found(line, expected):
    assert [wrong for arguments in commands(line) for wrong in mistakes(arguments)] == expected


def test_this_looks_at_the_documents():
    found = {arguments[0] for path in DOCUMENTS for _, line in code(text_of(path)) for arguments in commands(line)}
    assert {"train", "prepare", "plan", "doctor", "export", "evaluate", "generate", "report", "parity"} <= found
    assert all(isinstance(path, Path) and path.exists() for path in DOCUMENTS)
