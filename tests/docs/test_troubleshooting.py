"""docs/troubleshooting.md lists every exit code, and quotes only messages that the package can print."""

import ast
import re

from megagpt import errors
from tests.training import ROOT

TEXT = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
HOLE = "\0"  # in place of a formatted value


def tables(head):
    """Rows of all tables whose first column has this head."""
    for table in re.findall(rf"^\| {head} \|.*?\n\|.*?\n((?:\|.*\n)+)", TEXT, re.MULTILINE):
        yield from (line.split(" | ") for line in table.splitlines())


def messages():
    """Every string of the package, with HOLE in place of formatted values; parts of one expression are joined."""
    for path in (ROOT / "megagpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_exit_codes_are_those_of_the_package():
    section = TEXT.split("## Exit codes")[1].split("Codes that do not come from megagpt")[0]
    listed = [int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)]
    assert listed == sorted(value for name, value in vars(errors).items() if name.startswith("EXIT_"))


def test_quoted_messages_exist():
    quotes = {quote for row in tables("message") for quote in re.findall(r"`(.+?)`", row[0])}
    assert len(quotes) >= 20
    strings = list(messages())
    unknown = []
    for quote in quotes:
        pattern = re.escape(quote).replace("…", f".*?[{HOLE}].*?")
        if not any(re.search(pattern, text) for text in strings):
            unknown.append(quote)
    assert unknown == []


def test_each_entry_of_the_contents_is_a_section():
    anchors = re.findall(r"\]\(#([a-z-]+)\)", TEXT)
    sections = {line[3:].lower().replace(" ", "-") for line in TEXT.splitlines() if line.startswith("## ")}
    assert set(anchors) == sections
